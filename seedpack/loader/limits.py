"""Refuse what asks for too much: what decoding would take follows from the header, and is compared with a limit first."""

from __future__ import annotations

import math
from dataclasses import dataclass

from seedpack.errors import LimitError
from seedpack.formats import Checkpoint
from seedpack.memory import free_bytes

LEAST = 10**9  # what any file may take
RATIO = 1024  # bytes that a byte of the file may stand for: those of a photograph of 0.9 bits per pixel
SMALL = 1 << 24  # less is not compared with the memory that is free


@dataclass(frozen=True)
class Limit:
    """The bytes that something may take, and the limit's name in a message."""

    size: int
    name: str


def default_limit(checkpoint: Checkpoint, least: int | None = None) -> Limit:
    """Return the caller's limit, or else what a file of this size may take: no less than `least`, by default `LEAST`."""
    if checkpoint.max_bytes is not None:
        return Limit(checkpoint.max_bytes, f"max_bytes, {shown(checkpoint.max_bytes)}")
    size = max(LEAST if least is None else least, RATIO * checkpoint.stored_bytes)
    return Limit(size, f"the limit of {shown(size)} for a file of {checkpoint.stored_bytes:,} bytes")


def require_affordable(checkpoint: Checkpoint, subject: str, cost: int, *, in_memory: bool = True) -> None:
    """Refuse what takes more than the limit or, unless the caller has set it, than the memory that is free.

    Args:
        checkpoint: that is read.
        subject: of the message, as "tensor 'a.weight'".
        cost: what it takes, in bytes.
        in_memory: whether that is memory; if not, it may be more than is free.

    Raises:
        LimitError: with what it takes, the limit and the remedy.
    """
    limit = default_limit(checkpoint)
    if cost <= limit.size and in_memory and checkpoint.max_bytes is None and cost > SMALL:
        free = free_bytes()
        limit = min(limit, Limit(free, f"the {shown(free)} of memory that are free"), key=lambda limit: limit.size)
    if cost > limit.size:
        raise LimitError(
            f"{checkpoint.path}: {subject} would take {shown(cost)} decoded, more than {limit.name}; if you trust the "
            f"file, pass --max-bytes {enough(cost)} (max_bytes={cost})"
        )


def shown(size: int) -> str:
    """Return a number of bytes for people.

    >>> shown(64_000_000), shown(1_500_000_000)
    ('64.0 MB', '1.5 GB')
    """
    return f"{size / 1e6:.1f} MB" if size < 10**9 else f"{size / 1e9:.1f} GB"


def enough(size: int) -> str:
    """Return a size that is no less, as the command line takes it.

    >>> enough(64_000_001), enough(1_500_000_000)
    ('65MB', '2GB')
    """
    return f"{math.ceil(size / 1e6)}MB" if size < 10**9 else f"{math.ceil(size / 1e9)}GB"
