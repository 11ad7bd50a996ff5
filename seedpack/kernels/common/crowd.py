"""Other programs on the cores. A parallel region waits for all of its threads, also for one whose core another program holds:
after one that took far too long, products keep to their own thread for a while."""

from __future__ import annotations

LATE, SLOW = 1e-3, 2e9  # seconds, and weights times tokens a second: slower than any product on cores that are free


def too_long(work: int) -> float:
    """Return the seconds that are too many for a product of so many weights times tokens on several threads."""
    return LATE + work / SLOW


class Crowd:
    """The crowd on the cores, as products find it.

    Attributes:
        until: when products share work out again, by `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.until = 0.0
        self._compiled = False

    def late(self, started: float, took: float) -> None:
        """Learn of a product that took too long on several threads, in seconds; the first is taken to have been compiled."""
        if self._compiled:
            self.until = started + took + min(20 * took, 1.0)
        self._compiled = True
