"""Compare two causal language models on one text: perplexity of both, KL divergence, top-1 agreement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from seedpack.converter.calibration.tokens import sequences
from seedpack.errors import ModelError

POSITIONS_PER_STEP = 256


@dataclass(frozen=True)
class LanguageReport:
    """Means over all scored positions.

    Attributes:
        context: tokens per window; windows do not overlap, and the first token of each is not scored.
        tokens: positions scored.
        perplexity_original: exp of the mean negative log-likelihood (natural logarithm).
        perplexity_packed: the same of the packed model.
        kl_mean: mean KL(original ‖ packed) of the next-token distributions, in nats.
        kl_p99: its 99th percentile.
        top1_agreement: share of positions where both models' likeliest token is the same.
    """

    context: int
    tokens: int
    perplexity_original: float
    perplexity_packed: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return asdict(self)


def windows(tokenizer: Any, text: str, context: int, tokens: int) -> Tensor:
    """Return the first `tokens` tokens of a text as windows, int64 [n, context]; of a short text, one short window."""
    characters = 8 * tokens + 1000  # tokenizers are slow on what will not be used
    ids = tokenizer(text[:characters], add_special_tokens=False)["input_ids"]
    if len(ids) < 2:
        raise ModelError(f"the text gives {len(ids)} tokens; at least two are needed")
    return sequences(ids[:tokens], tokenizer, context)[: max(1, tokens // context)]


@torch.inference_mode()
def compare_language_models(
    original: Any, packed: Any, ids: Tensor, progress: Callable[[int], None] | None = None
) -> LanguageReport:
    """Score both models on windows of tokens.

    Args:
        original: a causal language model of transformers, the reference of the divergence.
        packed: another one with the same vocabulary.
        ids: int64 [windows, context].
        progress: called with the tokens scored since the last call.
    """
    nll_original, nll_packed, divergences, agreements = [], [], [], []
    for window in ids:
        logits = [model.eval()(window[None].to(model.device)).logits[0, :-1].cpu() for model in (original, packed)]
        sizes = [values.shape[-1] for values in logits]
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens; compare models of the same vocabulary"
            )
        for first in range(0, len(window) - 1, POSITIONS_PER_STEP):
            a, b = (values[first : first + POSITIONS_PER_STEP].float().log_softmax(-1) for values in logits)
            target = window[1 + first : 1 + first + len(a), None]
            nll_original.append(-a.gather(1, target)[:, 0])
            nll_packed.append(-b.gather(1, target)[:, 0])
            divergences.append((a.exp() * (a - b)).sum(-1))
            agreements.append(a.argmax(-1) == b.argmax(-1))
        del logits, a, b  # gigabytes for a large vocabulary: free them before the next window
        if progress:
            progress(len(window))
    kl = torch.cat(divergences).double()
    if not torch.isfinite(kl).all():
        raise ModelError("a model gives logits that are not finite on this text")
    return LanguageReport(
        context=ids.shape[1],
        tokens=len(kl),
        perplexity_original=float(torch.cat(nll_original).double().mean().exp()),
        perplexity_packed=float(torch.cat(nll_packed).double().mean().exp()),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1_agreement=float(torch.cat(agreements).double().mean()),
    )
