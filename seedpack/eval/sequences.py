"""Compare sequence-to-sequence models, teacher-forced: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seedpack.errors import ModelError
from seedpack.eval.language import NextTokenReport, compare_next_tokens
from seedpack.eval.models import Advance, run

TARGET_TOKENS = 64  # that a model writes, at most


@dataclass(frozen=True)
class SequenceReport(NextTokenReport):
    """Means over all tokens of the targets.

    Attributes:
        pairs: of a source and a target.
    """

    pairs: int


@torch.inference_mode()
def write_targets(model: Any, sources: Sequence[Tensor], progress: Advance | None = None) -> list[Tensor]:
    """Return what a model writes greedily for each source, int64 [n], at most `TARGET_TOKENS` tokens.

    Args:
        model: a sequence-to-sequence model of transformers.
        sources: tokens, int64 [n] each.
        progress: called with each source's tokens.
    """
    targets = []
    for source in sources:
        generate = partial(model.generate, max_new_tokens=TARGET_TOKENS, num_beams=1, do_sample=False)
        written = run(model, {"input_ids": source[None], "attention_mask": torch.ones_like(source)[None]}, generate)
        targets.append(written[0, 1:].cpu())  # without the token that decoders start with
        if progress:
            progress(len(source))
    return targets


def compare_sequence_models(
    original: Any, packed: Sequence[Any], pairs: Sequence[tuple[Tensor, Tensor]], progress: Advance | None = None
) -> list[SequenceReport]:
    """Score models on the tokens of targets, each given the source and the target's tokens before it.

    Args:
        original: a sequence-to-sequence model of transformers, the reference of the divergence.
        packed: others with the same vocabulary.
        pairs: tokens of a source and of its target, int64 [n] each.
        progress: called with each target's tokens.

    Returns:
        A report for each packed model.
    """

    def logits(model: Any, pair: tuple[Tensor, Tensor]) -> Tensor:
        source, target = pair
        return run(model, {"input_ids": source[None], "labels": target[None]}).logits[0]  # type: ignore[no-any-return]

    pairs = [(source, target) for source, target in pairs if len(target)]
    if not pairs:
        raise ModelError("no target has a token; at least one is needed")
    scores = compare_next_tokens(original, packed, ((pair, pair[1]) for pair in pairs), logits, progress)
    return [SequenceReport(**measures, pairs=len(pairs)) for measures, _ in scores]
