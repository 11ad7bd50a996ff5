"""Token ids for a language model to read, from a file or from a data set of the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedpack.errors import ModelError, first_line

PIECE = 1 << 16  # characters given to a tokenizer at once
TEXT_FIELDS = ("text", "content", "document")


def from_text(texts: Iterable[str], tokenizer: Any, tokens: int, context: int, where: str) -> Tensor:
    """Return the first `tokens` tokens of some texts, one after the other, int64 [n, context]."""
    ids: list[int] = []
    for piece in (text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE)):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            break
    cut = sequences(ids[:tokens], tokenizer, context)
    if not len(cut) or cut.shape[1] < context:
        raise ModelError(
            f"{where}: gives {len(ids)} tokens; calibration wants at least one sequence of {context}: give a longer text"
        )
    return cut[: tokens // context]


def sequences(ids: list[int], tokenizer: Any, context: int) -> Tensor:
    """Cut the tokens of a text into sequences without overlap, int64 [n, context], or a shorter one of a short text.

    Where a tokenizer puts a token before a text, each begins with it: models that were trained so are lost without.
    """
    if not ids:
        return torch.empty(0, context, dtype=torch.int64)
    first, bos = tokenizer("a")["input_ids"][:1], getattr(tokenizer, "bos_token_id", None)
    start = [bos] if bos is not None and first == [bos] else []
    step = min(context - len(start), len(ids))
    cut = [start + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)]
    return torch.tensor(cut, dtype=torch.int64)


def read_texts(path: Path) -> Iterator[str]:
    """Yield the text of a file; of .jsonl, the field "text" (or "content") of each line."""
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
    """Yield the texts of a data set of the hub, read as they come; `org/name` or `org/name:configuration`."""
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
