"""Choices read from bytes, and JSON documents that are changed by them: what a fuzzer learns to steer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")
NAMES = (
    "weight",
    "more_1",
    "right_weight",
    "scales",
    "w",
    "",
    "a\x1b[2J",
    "\u202ex",
    "\ud800",
    "../x",
    "é" * 200,
    "__metadata__",
)
NUMBERS = (0, 1, -1, 2, 7, 8, 16, 17, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**40)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1e-320, 2.0**-30, 1e308, float("inf"), float("-inf"), float("nan"))
WORDS = ("F32", "BF16", "U8", "I16", "raw", "svd", "stack", "seedlm", "field", "philox", "hadamard", "fast", "0" * 64)
VALUES: tuple[Any, ...] = (None, True, False, [], {}, [0], [[]], {"w": 0}, *NUMBERS, *FLOATS, *NAMES, *WORDS)


class Draws:
    """Reads choices from bytes; those used up are followed by zeros, so that any bytes are a whole program."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken.ljust(count, b"\0")

    def rest(self) -> bytes:
        """Return all bytes that are left."""
        return self.take(max(0, len(self._data) - self._at))

    def below(self, count: int) -> int:
        """Return a number from 0 to count - 1."""
        return int.from_bytes(self.take(1 if count <= 256 else 2), "little") % count

    def pick(self, items: Sequence[T]) -> T:
        """Return one of some items; the first one by default."""
        return items[self.below(len(items))]

    def value(self) -> Any:
        """Return any JSON value that holds no more than a few others."""
        kind = self.below(4)
        if kind == 0:
            return copied(self.pick(VALUES))
        if kind == 1:
            return int.from_bytes(self.take(1 + self.below(9)), "little", signed=True)
        return (
            struct.unpack("<d", self.take(8))[0] if kind == 2 else self.take(self.below(9)).decode("utf-8", "replace")
        )


def copied(value: Any) -> Any:
    """Return a copy of a JSON value."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def edited(document: Any, draws: Draws, most: int = 4) -> Any:
    """Return a JSON document with up to so many of its values replaced, left out, doubled, moved or new."""
    document = copied(document)
    for _ in range(draws.below(most + 1)):
        _edit(document, draws)
    return document


def _edit(document: Any, draws: Draws) -> None:
    holder, key = _place(document, draws)
    kind = draws.below(6)
    if kind == 0 and key is not None:
        holder[key] = draws.value()
    elif kind == 1 and key is not None:
        del holder[key]
    elif kind == 2 and key is not None:
        value = holder[key]
        holder[key] = value + draws.below(256) - 128 if type(value) is int else [value, value]
    elif kind == 3 and key is not None:
        other, place = _place(document, draws)
        holder[key] = copied(other if place is None else other[place])
    elif isinstance(holder, dict):
        holder[draws.pick(NAMES)] = draws.value()
    elif isinstance(holder, list):
        holder.append(draws.value())


def _place(document: Any, draws: Draws) -> tuple[Any, Any]:
    """Return a container in a document and a key of it, None where it is empty."""
    holder = document
    while True:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        if not keys:
            return holder, None
        key = draws.pick(keys)
        child = holder[key]
        if not isinstance(child, (dict, list)) or not draws.below(4):
            return holder, key
        holder = child
