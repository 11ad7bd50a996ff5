"""Layers that get the same activations one after the other (query, key and value), as a thread sees them.

They become companions: the first computes for all, and the others take what waits for them, if their activations are the same
to the byte. All that changes from call to call is kept as words in memory, for compiled code.
"""

from __future__ import annotations

import threading
from array import array as words_of
from typing import Any

import numpy as np
import torch

from seedpack.kernels.common.jit import jit
from seedpack.kernels.common.memory import array
from seedpack.kernels.common.vectors import LANES

LINE = 64  # bytes
MOST = 8  # companions, the first among them

# Words of a thread: its room and how many numbers of 32 bits that holds; of the last call the place of the activations, their
# bytes and kind, a copy of them, and the number of its layer; how many results waited after it, and how many still do; then for
# each the number of its layer, its place and its bytes.
ROOM, ROOM_SIZE, PLACE, BYTES, KIND, COPY, FIRST, WAITED, WAITING, RESULTS = range(10)
RESULT = 3
TAKEN = -1  # in place of a number
# How a call ends: the first two with a result.
DONE, NEIGHBOUR, NOTHING, STALE, NO_ROOM, PARTED = range(6)


@jit()
def same(one: int, other: int, size: int) -> bool:
    """Return whether the bytes at two addresses are the same."""
    a, b, different = array(one, np.uint8, size), array(other, np.uint8, size), np.uint8(0)
    for i in range(size):
        different |= a[i] ^ b[i]
    return bool(different == 0)


@jit(inner=True)
def copy(to: int, source: int, size: int) -> None:
    """Copy bytes from one address to another."""
    a, b = array(to, np.uint8, size), array(source, np.uint8, size)
    for i in range(size):
        a[i] = b[i]


@jit(inner=True)
def take(at: int, number: int, x: int, size: int, kind: int, y: int) -> int:
    """Store at y the result that waits for a layer, if it is that of the `size` bytes at x.

    Returns DONE; NOTHING where none waits for anybody; PARTED where it is of other activations, or waits for others: those that
    are still named among the results are companions no more.
    """
    thread = array(at, np.int64, RESULTS + RESULT * MOST)
    if not thread[WAITING]:
        return NOTHING
    for i in range(thread[WAITED]):
        result = RESULTS + RESULT * i
        if thread[result] == number:
            if thread[PLACE] != x or thread[BYTES] != size or thread[KIND] != kind or not same(x, thread[COPY], size):
                return PARTED
            copy(y, thread[result + 1], thread[result + 2])
            thread[result] = TAKEN
            thread[WAITING] -= 1
            return DONE
    return PARTED


@jit(inner=True)
def keep(at: int, number: int, count: int, x: int, size: int, kind: int) -> int:
    """Keep what a call of a layer and of its companions, `count` in all, has computed from the bytes at x; the places of results
    and of the copy are named already.

    Returns NEIGHBOUR where a layer without companions had its activations where another just had them, else DONE.
    """
    thread = array(at, np.int64, RESULTS)
    if count == 1 and thread[PLACE] == x and thread[FIRST] != number:
        return NEIGHBOUR
    thread[FIRST], thread[PLACE], thread[BYTES], thread[KIND] = number, x, size, kind
    thread[WAITED] = thread[WAITING] = count - 1
    if count > 1:
        copy(thread[COPY], x, size)
    return DONE


class Thread(threading.local):
    """A thread's words, at the address `at`."""

    def __init__(self) -> None:
        self.words = words_of("q", [0] * (RESULTS + RESULT * MOST))
        self.words[FIRST] = TAKEN
        self.at = self.words.buffer_info()[0]
        self._room: Any = None

    def make_room(self, size: int) -> None:
        """Make room for so many numbers of 32 bits, which stays there from call to call."""
        self._room = torch.empty(size + LANES, dtype=torch.int32)
        self.words[ROOM] = self._room.data_ptr() + -self._room.data_ptr() % LINE
        self.words[ROOM_SIZE] = size

    def parted(self) -> list[int]:
        """Return the numbers of the layers whose results were not taken, for which nothing waits any more."""
        results = self.words[RESULTS : RESULTS + RESULT * self.words[WAITED] : RESULT]
        self.words[WAITED] = self.words[WAITING] = 0
        return [number for number in results if number != TAKEN]
