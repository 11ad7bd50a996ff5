"""Threads that share a job, for work of microseconds: they wait in compiled code for the next one, and nobody waits for them.

The caller works too. Whoever is free takes the next piece of a job; when none is left, the caller waits only for those
that are at one. So where other programs hold the cores, it does all by itself, and never waits for a thread that the system
has not woken. After a while without a job the threads sleep, until a caller wakes them.

A call that finds them at another caller's job works alone, and so does a forked child, which has no threads.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import suppress

import numba
import torch

from seedpack.kernels.common import jit as modes
from seedpack.kernels.common.jit import jit
from seedpack.kernels.common.memory import atomic_add, atomic_load, call_at, exchange, pause, yield_core
from seedpack.kernels.common.native import Native

LINE = 64  # bytes; words that several threads write to lie on lines of their own
# Offsets of the words that the threads share: whether a job is shared out; its number, odd while it is open; the threads at
# it; the function, what it is called with, and how many may help; how many sleep; then for each thread whether it does.
BUSY, ROUND, ACTIVE, FUNCTION, CALL, LIMIT, SLEEPERS, ASLEEP = (LINE * i for i in range(8))
WATCHES = 100_000  # looks for a job before a thread sleeps: a few milliseconds
PATIENCE = 2000  # looks, at a job or for the others to be done, before a thread offers its core to others at each 16th


@jit()
def _rest(looks: int) -> None:
    """Wait a moment between two looks."""
    if looks > PATIENCE and looks % 16 == 0:
        yield_core()
    pause()


@jit()
def share_out(board: int, limit: int, function: int, call: int) -> None:
    """Have `function(call)` run by this thread and by up to `limit` others, where they are free; 0 for `board`: by this alone."""
    if board == 0 or limit == 0 or exchange(board + BUSY, 1):
        call_at(function, call)
        return
    exchange(board + FUNCTION, function)
    exchange(board + CALL, call)
    exchange(board + LIMIT, limit)
    atomic_add(board + ROUND, 1)
    call_at(function, call)
    atomic_add(board + ROUND, 1)
    looks = 0
    while atomic_load(board + ACTIVE):
        looks += 1
        _rest(looks)
    exchange(board + BUSY, 0)


def _help(board: int, index: int) -> int:
    """Take part in jobs until none has come for a while."""
    atomic_add(board + SLEEPERS, -1)
    looks, seen = 0, 0
    while looks < WATCHES:
        job = atomic_load(board + ROUND)
        if job & 1 and job != seen:
            atomic_add(board + ACTIVE, 1)
            if atomic_load(board + ROUND) == job and index < atomic_load(board + LIMIT):
                call_at(atomic_load(board + FUNCTION), atomic_load(board + CALL))
            atomic_add(board + ACTIVE, -1)
            seen, looks = job, 0
        looks += 1
        _rest(looks)
    exchange(board + ASLEEP + LINE * index, 1)
    atomic_add(board + SLEEPERS, 1)
    return 0


class _Team:
    """The threads of this process, all but the caller's.

    Attributes:
        board: address of the words that they share.
        sleepers: how many of them sleep.
    """

    def __init__(self, count: int):
        self._words = (ctypes.c_int64 * ((ASLEEP + (count + 1) * LINE) // 8))()
        start = ctypes.addressof(self._words)
        self.board = start + -start % LINE
        self.sleepers = ctypes.c_int64.from_address(self.board + SLEEPERS)
        self._asleep = [ctypes.c_int64.from_address(self.board + ASLEEP + LINE * i) for i in range(count)]
        self.sleepers.value = count
        self._help = Native(_help, 2)
        self._locks = [threading.Lock() for _ in range(count)]
        for index, lock in enumerate(self._locks):
            lock.acquire()
            threading.Thread(target=self._run, args=(index, lock), name=f"seedpack-{index}", daemon=True).start()

    def _run(self, index: int, lock: threading.Lock) -> None:
        while True:
            self._help.call(self.board, index)
            lock.acquire()  # until `wake`

    def wake(self) -> None:
        """Wake the threads that sleep."""
        for asleep, lock in zip(self._asleep, self._locks, strict=True):
            if asleep.value:
                asleep.value = 0
                with suppress(RuntimeError):  # another caller did it at the same time
                    lock.release()


_team: _Team | None = None
_making = threading.Lock()


def ready() -> tuple[int, int]:
    """Return what `share_out` takes: the board of the threads, which are awake now, and how many of them may help."""
    global _team
    others = torch.get_num_threads() - 1
    if others < 1 or modes.alone():
        return 0, 0
    if _team is None:
        with _making:
            _team = _team or _Team(numba.config.NUMBA_NUM_THREADS - 1)  # type: ignore[attr-defined]
    if _team.sleepers.value:
        _team.wake()
    return _team.board, others
