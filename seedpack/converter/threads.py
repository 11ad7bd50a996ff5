"""How many threads a process computes on: torch's, and those of compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


def use_threads(count: int) -> None:
    """Compute on so many threads from now on, in this process."""
    torch.set_num_threads(count)
    with suppress(ImportError):  # without it there are no compiled kernels
        import numba

        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Compute on so many threads in a block; None leaves them as they are."""
    before = torch.get_num_threads()
    if count is not None:
        use_threads(count)
    try:
        yield
    finally:
        if count is not None:
            use_threads(before)
