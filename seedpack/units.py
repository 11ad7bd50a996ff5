"""Numbers as people read them: bytes and seconds. Standard library only."""

from __future__ import annotations


def size(count: float) -> str:
    """Format a number of bytes, in decimal units.

    >>> size(123_456_789)
    '123.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Format a number of seconds.

    >>> duration(3), duration(75), duration(18_000), duration(100_000)
    ('3.0s', '1m15s', '5h00m', '1d03h')
    """
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes_left:02d}m" if hours else f"{minutes}m{rest:02d}s"
    return f"{hours // 24}d{hours % 24:02d}h"


def count(number: int, noun: str) -> str:
    """Format a number of things.

    >>> count(1, "tensor"), count(1200, "tensor")
    ('1 tensor', '1,200 tensors')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
