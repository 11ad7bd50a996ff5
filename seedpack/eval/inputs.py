"""Inputs to compare models on: the lines of a text, and the images of a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from seedpack.errors import ModelError, first_line
from seedpack.eval.models import Batch

BATCH = 16
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Line:
    """A line of a text: what stands before its first tab, and after it; None without a tab."""

    number: int
    text: str
    answer: str | None


def read_lines(path: Path, answers: bool = True) -> list[Line]:
    """Return the lines of a file that are not blank.

    Args:
        path: of the file.
        answers: what stands after a tab is an answer, and no part of the text.

    Raises:
        ModelError: there is none, or some have an answer and others none.
    """
    lines = []
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), 1):
        text, tab, answer = line.strip().partition("\t" if answers else "\n")
        if text:
            lines.append(Line(number, text.rstrip(), answer.strip() if tab else None))
    if not lines:
        raise ModelError(f"{path}: has no lines of text")
    if odd := [line for line in lines if (line.answer is None) != (lines[0].answer is None)]:
        has, first = ("no tab", "has one") if odd[0].answer is None else ("a tab", "has none")
        raise ModelError(
            f"{path}: line {odd[0].number} has {has}, but line {lines[0].number} {first}; "
            "give each line an answer after a tab, or none"
        )
    return lines


def encode_lines(tokenizer: Any, texts: Sequence[str], context: int, tokens: int) -> list[Any]:
    """Return what a tokenizer makes of the first texts that have together at most `tokens` tokens; of one at least.

    Each is cut off after `context` tokens.
    """
    encoded: list[Any] = []
    total = 0
    for text in texts:
        encoding = tokenizer(text, truncation=True, max_length=context)
        total += len(encoding["input_ids"])
        if encoded and total > tokens:
            break
        encoded.append(encoding)
    return encoded


def text_batches(tokenizer: Any, model: Any, encoded: Sequence[Any]) -> Iterator[Batch]:
    """Yield encoded texts in batches, padded; one by one where a model or its tokenizer has no token to pad with."""
    pads = tokenizer.pad_token_id is not None and getattr(model.config, "pad_token_id", None) is not None
    step = BATCH if pads else 1
    for start in range(0, len(encoded), step):
        yield tokenizer.pad(
            list(encoded[start : start + step]), padding=pads, padding_side="right", return_tensors="pt"
        )


def find_images(folder: Path, classes: Mapping[str, int]) -> tuple[list[Path], list[int] | None]:
    """Return the images of a folder and its sub-folders, and their classes, where the sub-folders are named by labels.

    Args:
        folder: sub-folders are named by labels, all or none.
        classes: by label.

    Raises:
        ModelError: there is no image, or only some lie in folders that are named by labels.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ModelError(f"{folder}: has no images; expected files that end in {', '.join(sorted(SUFFIXES))}")
    labels = [classes.get(path.parent.name) if path.parent != folder else None for path in files]
    known = [label for label in labels if label is not None]
    if known and len(known) < len(files):
        raise ModelError(
            f"{files[labels.index(None)]}: lies in no folder that is named by a label of the model, as other images do; "
            f"expected {some_labels(classes)}"
        )
    return files, known or None


def some_labels(classes: Mapping[str, int]) -> str:
    """Return the first labels of a model, for messages."""
    names = list({index: label for label, index in classes.items()}.values())
    return ", ".join(repr(name) for name in names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def image_batches(processor: Any, files: Sequence[Path]) -> Iterator[Batch]:
    """Yield images in batches, as a model's image processor makes them; those of one shape together."""
    for start in range(0, len(files), BATCH):
        pixels = [_pixels(processor, file) for file in files[start : start + BATCH]]
        for _, group in groupby(pixels, key=lambda image: image.shape):
            yield {"pixel_values": torch.cat(list(group))}


def _pixels(processor: Any, file: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    except Exception as error:  # Pillow's and the processor's own
        raise ModelError(f"{file}: cannot be read as an image ({first_line(error)})") from error
