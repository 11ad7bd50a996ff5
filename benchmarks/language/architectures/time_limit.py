"""Limits of time for foreign code."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator


class TimedOut(BaseException):
    """Raised when time is up; no `Exception`, so that no handler of other errors takes it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimedOut` in what takes longer; a limit may lie within another one. Only in the main thread."""

    def stop(*_: object) -> None:
        raise TimedOut(f"over {seconds:g} s")

    outer_handler = signal.signal(signal.SIGALRM, stop)
    outer_seconds, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, outer_handler)
        if outer_seconds:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, outer_seconds - (time.monotonic() - started)))
