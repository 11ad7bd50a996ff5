"""Token ids for a language model to read: written by itself, from a file, or from a data set of the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedpack.converter.calibration.hessians import evaluated
from seedpack.converter.calibration.layerwise import device_of
from seedpack.errors import ModelError, first_line

AT_ONCE = 64  # sequences written side by side
PIECE = 1 << 16  # characters given to a tokenizer at once
TEXT_FIELDS = ("text", "content", "document")


def written(model: Any, tokens: int, context: int, seed: int = 0, watch: Callable[[int], None] | None = None) -> Tensor:
    """Text that the model writes itself, int64 [n, context] (self-calibration: Williams et al., NAACL 2025).

    Sampled from its own distribution at temperature 1, from nothing but its first token on; no data set is needed.

    Args:
        model: a causal language model of transformers.
        tokens: in all; n is at least one.
        context: tokens of a sequence.
        seed: of the sampling.
        watch: called with the tokens written since the last call.
    """
    from transformers import GenerationConfig

    count = max(1, tokens // context)
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    first = getattr(model.config, "bos_token_id", None)
    first = first[0] if isinstance(first, list) else first
    parts = []
    with torch.random.fork_rng(), torch.inference_mode(), evaluated(model):
        torch.manual_seed(seed)
        for sequences in torch.arange(count).split(AT_ONCE):
            shape = (len(sequences), 1)
            start = torch.randint(vocabulary, shape) if first is None else torch.full(shape, first)
            start = start.to(device_of(model))
            options = GenerationConfig(
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=context - 1, min_new_tokens=context - 1,
                pad_token_id=0,
            )  # fmt: skip
            found = model.generate(
                start, attention_mask=torch.ones_like(start), generation_config=options,
                logits_processor=[_Told(watch)] if watch else None,
            )  # fmt: skip
            parts.append(found[:, :context].cpu())
    return torch.cat(parts)


class _Told:
    """Tells of each token written, and changes nothing."""

    def __init__(self, watch: Callable[[int], None]):
        self._watch = watch

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self._watch(len(ids))
        return scores


def from_text(texts: Iterable[str], tokenizer: Any, tokens: int, context: int, where: str) -> Tensor:
    """The first `tokens` tokens of some texts, one after the other, int64 [n, context]."""
    ids: list[int] = []
    for piece in (text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE)):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            break
    found = sequences(ids[:tokens], tokenizer, context)
    if found.shape[1] < context:
        raise ModelError(
            f"{where}: gives {len(ids)} tokens; calibration wants at least one sequence of {context}: give a longer text"
        )
    return found[: tokens // context]


def sequences(ids: list[int], tokenizer: Any, context: int) -> Tensor:
    """Tokens of a text as sequences without overlap, int64 [n, context], or a shorter one of a short text. Where a tokenizer
    puts a token before a text, each begins with that, as models that were trained so are lost without it."""
    first, bos = tokenizer("a")["input_ids"][:1], getattr(tokenizer, "bos_token_id", None)
    start = [bos] if bos is not None and first == [bos] else []
    step = min(context - len(start), len(ids))
    cut = [start + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)]
    return torch.tensor(cut, dtype=torch.int64)


def read_texts(path: Path) -> Iterator[str]:
    """The text of a file; of .jsonl, the field "text" (or "content") of each line."""
    try:
        if path.suffix.lower() not in (".jsonl", ".json"):
            yield path.read_text("utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(json.loads(line), f"{path}: line {number}")
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: cannot be read as text ({first_line(error)})") from None


def hub_texts(name: str) -> Iterator[str]:
    """The texts of a data set of the hub, read as they come; `org/name` or `org/name:configuration`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ModelError(f"calibration {name!r}: reading data sets of the hub needs `pip install datasets`") from None
    identity, _, configuration = name.partition(":")
    try:
        for row in load_dataset(identity, configuration or None, split="train", streaming=True):
            yield _text_of(row, name)
    except ModelError:
        raise
    except Exception as error:  # the library's and the network's
        raise ModelError(f"calibration {name!r}: the data set cannot be read ({first_line(error)})") from None


def _text_of(row: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    for field in TEXT_FIELDS:
        if isinstance(row, dict) and isinstance(row.get(field), str):
            return str(row[field])
    raise ModelError(f"{where}: has no text; expected a field {' or '.join(TEXT_FIELDS)}")
