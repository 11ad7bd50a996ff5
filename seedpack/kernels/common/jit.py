"""Compile functions for the CPU with Numba, on first use: kept on disk, and safe in threads and in forked processes.

Threads do not survive a fork: Numba ends a child that needs those of GNU OpenMP, and who shares them with torch waits for ever
(DataLoader's workers, gunicorn --preload). So a forked child computes on one thread, with the same results.

Where neither OpenMP nor TBB is installed Numba shares work out by itself, one call at a time: a second one from another
thread would abort the process. There calls wait for each other.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from enum import Enum
from functools import cache, wraps
from typing import Any, TypeVar, cast

import numba
import torch

from seedpack.kernels.common.code_cache import keep_on_disk

Function = TypeVar("Function", bound=Callable[..., Any])


class Mode(Enum):
    """The way in which this process calls parallel kernels."""

    UNKNOWN = "one at a time, until Numba has chosen who shares work out"
    TOGETHER = "as they come"
    IN_TURN = "one at a time"
    SERIAL = "on one thread"


_mode = Mode.UNKNOWN
_torch_threads_started = False  # by a kernel
_turn = threading.RLock()


def jit(*, parallel: bool = False, inner: bool = False, **options: Any) -> Callable[[Function], Function]:
    """Return a decorator that compiles a function on its first call, to run without Python's lock.

    Args:
        parallel: whether its `prange` loops run on all cores. Such a function is called from Python, not from compiled code.
        inner: whether it is called from compiled code alone, which then takes less long to compile.
        **options: those of `numba.njit`.
    """

    def decorate(function: Function) -> Function:
        if parallel:
            return _parallel(function, options)
        if inner:
            options.update(no_cpython_wrapper=True, no_cfunc_wrapper=True)
        return cast(Function, _dispatcher(function, "serial", options))

    return decorate


def thread_count() -> int:
    """Return how many threads a parallel kernel runs on."""
    return 1 if _mode is Mode.SERIAL else int(numba.get_num_threads())


def torch_thread_count() -> int:
    """Return how many of torch's threads a kernel may run on, which it is then taken to do."""
    global _torch_threads_started
    if _mode is Mode.SERIAL:
        return 1
    _torch_threads_started = True
    return torch.get_num_threads()


def _dispatcher(function: Callable[..., Any], variant: str, options: dict[str, Any]) -> Any:
    dispatcher = numba.njit(nogil=True, parallel=variant == "parallel", **options)(function)
    keep_on_disk(dispatcher, variant)
    return dispatcher


def _parallel(function: Function, options: dict[str, Any]) -> Function:
    """Return the function in both variants, of which each call takes the one that this process can run."""
    on_threads = _dispatcher(function, "parallel", options)

    @cache
    def on_one() -> Any:
        return _dispatcher(function, "serial", options)

    @wraps(function)
    def call(*args: Any) -> Any:
        if _mode is Mode.TOGETHER:
            return on_threads(*args)
        if _mode is Mode.SERIAL:
            return on_one()(*args)
        with _turn:
            result = on_threads(*args)
            _look_at_threads()
        return result

    return cast(Function, call)


def _threading_layer() -> str | None:
    """Return who shares work out among Numba's threads, or None before they have started."""
    try:
        return str(numba.threading_layer())  # type: ignore[attr-defined]
    except ValueError:
        return None


def _look_at_threads() -> None:
    global _mode
    _mode = Mode.IN_TURN if _threading_layer() == "workqueue" else Mode.TOGETHER


def _after_fork() -> None:
    """Compute on one thread in a child: its parent's threads may have started, torch's alone too, and be waited for.

    The lock may be held by one of them.
    """
    global _mode, _turn
    _turn, _mode = threading.RLock(), Mode.SERIAL
    if _threading_layer() is not None or _torch_threads_started:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
