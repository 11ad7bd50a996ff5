"""The product of few tokens on CPUs, in one call: mix, round to 8 or 16 bits, multiply by the packed rows.

What does not change from call to call is prepared once, as words in memory. The product itself is the codec's: a function that
takes rows until none is left, run by several threads. Integers are exact; each group of 256 is scaled in float32.

Layers that get the same activations one after the other (query, key and value) become companions: the first of them computes
for all, and the others return what waits for them, if their activations are the same to the byte.
"""

from __future__ import annotations

import threading
import weakref
from array import array as words_of
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count as numbers
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seedpack.kernels.common.activations import KINDS, Layout, read_floats, round_token, write_floats
from seedpack.kernels.common.byte_dots import pattern, way
from seedpack.kernels.common.jit import jit, torch_thread_count
from seedpack.kernels.common.memory import array, call_at, call_together, on_stack
from seedpack.kernels.common.native import Native
from seedpack.kernels.common.openmp import parallel_region
from seedpack.kernels.common.row_tiles import FEW_TOKENS, Product, padded_token_count
from seedpack.kernels.common.vectors import LANES
from seedpack.kernels.rotation.cpu import mix_row

LINE = 64  # bytes
ALONE = 1 << 16  # weights, times tokens, up to which one thread is faster than two
LATE, SLOW = 1e-3, 2e9  # seconds, and weights times tokens a second: slower than any product on cores that are free
PIECES = 2, 16  # of a layer's rows for each thread, at least and at most
PIECE = 1 << 17  # weights of a piece at least, where there are more pieces than the least

# Words of a layer; the codec's own are at CODE. Behind them, for each part that it was prepared from: its address, that of a
# copy, and their bytes.
ROWS, COLUMNS, PLANES, FACTOR, ODD, SMALL, ORDER, SCALE, BIAS, CODE = range(10)
PADDED, GROUP, PLANE_WORDS, WEIGHTS, BLOCK, CENTRE, OFFSETS, COPIES, KEPT_FIRST = 10, 11, 12, 13, 14, 15, 16, 18, 19
# Words of a call. NEXT, the row that is taken next, is written to by all threads and has a line of its own.
NEXT, LAYER, CODES, STARTS, STEPS, OUT, TOKENS, KIND, STEP, WORDS = 0, 8, 9, 10, 11, 12, 13, 14, 15, 16
MEMBER = 3  # words of a member of a call: its layer, its product, its result
MOST_MEMBERS = 8
ROWS_AT_ONCE = 32  # whose products are kept before they are stored

on_row, three_words = on_stack(4 * ROWS_AT_ONCE), on_stack(24)


@jit(inner=True)
def store_rows(call: Any, layer: Any, first: int, count: int, products: int, width: int) -> None:
    """Store the float32 products [count, width] at an address, at most `ROWS_AT_ONCE` rows from `first` on, times their scales
    and with their biases, as the result."""
    rows, planes = layer[ROWS], layer[PLANES]
    scale, found = array(layer[SCALE] + 4 * first, np.float32, count), array(products, np.float32, count * width)
    at = on_row()
    values = array(at, np.float32, count)
    for t in range(call[TOKENS]):
        for i in range(count):
            value = found[i * width + planes * t]
            if planes == 2:
                value += found[i * width + 2 * t + 1]
            values[i] = value * scale[i]
        if layer[BIAS]:
            bias = array(layer[BIAS] + 4 * first, np.float32, count)
            for i in range(count):
                values[i] += bias[i]
        write_floats(at, call[OUT], call[KIND], t * rows + first, count)


@jit(inner=True)
def _stale(layer: Any) -> bool:
    """Return whether the parts that a layer was prepared from have other bytes now."""
    for copy in range(layer[COPIES]):
        at = KEPT_FIRST + 3 * copy
        now, then = array(layer[at], np.uint8, layer[at + 2]), array(layer[at + 1], np.uint8, layer[at + 2])
        different = np.uint8(0)
        for i in range(layer[at + 2]):
            different |= now[i] ^ then[i]
        if different:
            return True
    return False


@jit()
def _scratch(layer: Any, tokens: int) -> tuple[int, int, int, int]:
    """Return how many numbers of 32 bits the codes of a layer's call take, the starts of its sums, the steps, and the activations
    with what mixing them takes: for a power of two of tokens and planes."""
    all_tokens = 1
    while all_tokens < tokens * layer[PLANES]:
        all_tokens *= 2
    groups = -(-layer[PADDED] // layer[GROUP])
    codes, starts = all_tokens * layer[PLANE_WORDS], all_tokens * groups * LANES
    floats = -(-(layer[PADDED] + 2 * layer[COLUMNS]) // LANES) * LANES
    return codes, starts, -(-all_tokens * groups // LANES) * LANES, floats


@jit(inner=True)
def _begin(
    members: int, count: int, x: int, tokens: int, kind: int, threads: int, mask: int, factor: int, room: int
) -> bool:
    """Mix and round `tokens` activations at x for each member; the words of the calls [count, words], and what they point into,
    go into the room at an address. Returns whether the members' parts are still the same; if not, nothing is to be run."""
    member = array(members, np.int64, MEMBER * count)
    at = room + 8 * WORDS * count
    for m in range(count):
        layer, call = array(member[MEMBER * m], np.int64, KEPT_FIRST), array(room + 8 * WORDS * m, np.int64, WORDS)
        if _stale(array(member[MEMBER * m], np.int64, KEPT_FIRST + 3 * layer[COPIES])):
            return False
        columns, padded, planes = layer[COLUMNS], layer[PADDED], layer[PLANES]
        codes, starts, steps, floats = _scratch(layer, tokens)
        call[NEXT], call[LAYER], call[OUT] = 0, member[MEMBER * m], member[MEMBER * m + 2]
        call[TOKENS], call[KIND] = tokens, kind
        call[CODES], call[STARTS], call[STEPS] = at, at + 4 * codes, at + 4 * (codes + starts)
        least, most = layer[ROWS] // (PIECES[1] * threads), layer[ROWS] // (PIECES[0] * threads)
        call[STEP] = max(1, min(most, max(least, PIECE // columns))) if threads > 1 else layer[ROWS]
        y = at + 4 * (codes + starts + steps)
        work = y + 4 * padded
        at = y + 4 * floats
        groups, values = planes * -(-padded // layer[GROUP]), array(y, np.float32, padded)
        for t in range(tokens):
            read_floats(x, kind, t * columns, y, columns)
            for i in range(columns, padded):
                values[i] = 0
            if layer[FACTOR]:
                times = array(layer[FACTOR], np.float32, columns)
                for i in range(columns):
                    values[i] *= times[i]
                mix_row(y, columns, layer[ODD], layer[SMALL], layer[ORDER], work)
            round_token(
                y, padded, layer[WEIGHTS], planes, call[CODES] + 4 * t * planes * layer[PLANE_WORDS],
                call[STARTS] + 4 * LANES * t * groups, call[STEPS] + 4 * t * groups,
                (layer[OFFSETS], layer[OFFSETS + 1]), mask, factor, layer[GROUP], layer[PLANE_WORDS], layer[BLOCK],
                layer[CENTRE],
            )  # fmt: skip
    return True


@jit(inner=True)
def _multiply(members: int, count: int, room: int) -> None:
    """Take rows of each member's layer in turn, until none is left."""
    member = array(members, np.int64, MEMBER * count)
    for m in range(count):
        call_at(member[MEMBER * m + 1], room + 8 * WORDS * m)


@cache
def _take() -> Native:
    def take(at: int) -> int:
        """Multiply by the rows that are left of the calls whose members, count and room are named at an address."""
        words = array(at, np.int64, 3)
        _multiply(words[0], words[1], words[2])
        return 0

    return Native(take, "take")


@jit()
def _run(
    members: int, count: int, x: int, tokens: int, kind: int, mask: int, factor: int, threads: int, room: int, region: int,
    take: int,
) -> bool:  # fmt: skip
    """Multiply `tokens` activations at x by the layers of some members, on one thread or on torch's; returns whether their
    parts were still the same."""
    if not _begin(members, count, x, tokens, kind, threads, mask, factor, room):
        return False
    if threads == 1:
        _multiply(members, count, room)
    else:
        at = three_words()
        words = array(at, np.int64, 3)
        words[0], words[1], words[2] = members, count, room
        call_together(region, take, at, threads)
    return True


@jit(parallel=True)
def _run_by_numba(
    members: int, count: int, x: int, tokens: int, kind: int, mask: int, factor: int, threads: int, room: int
) -> bool:
    """Do as `_run`, on Numba's threads."""
    if not _begin(members, count, x, tokens, kind, threads, mask, factor, room):
        return False
    for _ in prange(threads):
        _multiply(members, count, room)
    return True


@jit()
def _same(one: int, other: int, size: int) -> bool:
    """Return whether the bytes at two addresses are the same."""
    a, b, different = array(one, np.uint8, size), array(other, np.uint8, size), np.uint8(0)
    for i in range(size):
        different |= a[i] ^ b[i]
    return bool(different == 0)


class _Thread(threading.local):
    """A thread's last call: the layer that computed, the activations, and the results of others that it has computed.

    That two layers were given activations at one place makes them companions. Whether these are the same is seen by their bytes
    when the second asks for its result; if it does not ask, or they differ, the two are none any more.
    """

    def __init__(self) -> None:
        self.words = words_of("q", [0] * MEMBER * MOST_MEMBERS)
        self.at = self.words.buffer_info()[0]
        self.leader: Callable[[], Prepared | None] = lambda: None
        self.memory = torch.empty(0, dtype=torch.int32)
        self.place = 0
        self.given: Tensor | None = None  # a copy of the activations
        self.waiting: dict[int, Tensor] = {}  # by the number of the layer, which no other ever gets

    def room(self, size: int) -> int:
        """Return the address of room for so many numbers of 32 bits, which is the same from call to call."""
        if len(self.memory) < size + LANES:
            self.memory = torch.empty(size + LANES, dtype=torch.int32)
        return self.memory.data_ptr() + -self.memory.data_ptr() % LINE

    def take(self, layer: Prepared, x: Tensor, place: int) -> Tensor | None:
        """Return the result that waits for a layer, if it is that of x."""
        ready, given = self.waiting.pop(layer.number, None), self.given
        if ready is None or given is None:
            return None
        alike = place == self.place and x.shape == given.shape and x.dtype == given.dtype
        if alike and _same(place, given.data_ptr(), x.nbytes):
            return ready
        if (leader := self.leader()) is not None:
            leader.part_with(layer)
        return None

    def put(self, members: Sequence[Prepared], x: Tensor, place: int, results: Sequence[Tensor]) -> None:
        """Keep the results of a layer's companions, or make it the companion of the one before; it is the first of the members."""
        if self.waiting and (leader := self.leader()) is not None:
            for member in leader.members[1:]:
                if member.number in self.waiting:
                    leader.part_with(member)
        if len(results) > 1:
            self.given = x.clone()
            self.waiting = {member.number: y for member, y in zip(members[1:], results[1:], strict=True)}
        else:
            self.waiting = {}
            if place == self.place and (leader := self.leader()) is not None and leader.join(members[0]):
                return
        self.leader, self.place = members[0].reference, place


_thread = _Thread()


class _Crowd:
    """Other programs on the cores. A region waits for all of its threads, also for one whose core another program holds; after
    one that took far too long, products keep to their own thread for a while.

    Attributes:
        until: when they share work out again, by `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.until = 0.0
        self._compiled = False

    def watch(self, work: int, started: float, took: float) -> None:
        """See how long a product of so many weights times tokens took on several threads, in seconds; the first is compiled."""
        if self._compiled and took > LATE + work / SLOW:
            self.until = started + took + min(20 * took, 1.0)
        self._compiled = True


_crowd = _Crowd()
_numbers = numbers()


class Prepared(Product):
    """A layer's product for few tokens, ready to be called.

    Args:
        shape: of the weight, [rows, columns].
        planes: 1 for activations of 8 bits, 2 for 16.
        factor: what activations are multiplied by before they are mixed, float32 [columns]; None: they are not mixed.
        mixing: the odd order of the mixing and the matrix of it, see `rotation.cpu.plan`.
        scale: float32 [rows], of the integers.
        layout: of the activations.
        bias: [rows], or None.
        code: the codec's own words.
        kept: the parts that all of this comes from; if their bytes change, the layer is prepared anew.
        alive: what else must stay in memory.
        share: makes the function that takes rows, for a count of tokens and planes.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        planes: int,
        factor: Tensor | None,
        mixing: tuple[int, Any],
        scale: Tensor,
        layout: Layout,
        bias: Tensor | None,
        code: Any,
        kept: Sequence[Tensor],
        alive: object,
        share: Callable[[int], Native],
    ):
        rows, columns = shape
        odd, small = mixing
        single = None if bias is None else bias.detach().to(torch.float32)
        tensors = [tensor.detach() for tensor in (*kept, *([] if bias is None else [bias]))]
        copies = [tensor.clone() for tensor in tensors]
        self._alive = factor, small, scale, single, code, tensors, copies, alive
        words = [rows, columns, planes]
        words += [address(factor), odd, small.ctypes.data, len(small), address(scale), address(single)]
        words += [
            code.ctypes.data,
            layout.padded,
            layout.group,
            layout.words,
            layout.weights,
            layout.block,
            layout.centre,
        ]
        words += [layout.offsets[0], layout.offsets[-1], len(copies)]
        for tensor, copy in zip(tensors, copies, strict=True):
            words += [tensor.data_ptr(), copy.data_ptr(), copy.nbytes]
        self._words = np.array(words, np.int64)
        self.at, self.rows, self.columns, self.planes = self._words.ctypes.data, rows, columns, planes
        self._share, self._shares = share, dict[int, tuple[int, int]]()
        self._pattern = pattern(way(), layout.weights)
        self.most_tokens, self.number = FEW_TOKENS // planes, next(_numbers)
        self.members = [self]  # this, and its companions
        self._strangers: set[int] = set()  # former companions
        self.reference = weakref.ref(self)

    def join(self, other: Prepared) -> bool:
        """Make a layer a companion, unless it has been one, or has other activations."""
        if other.columns != self.columns or other.planes != self.planes or other.number in self._strangers:
            return False
        if other not in self.members:
            if len(self.members) == MOST_MEMBERS:
                return False
            self.members = [*self.members, other]
        return other is not self

    def part_with(self, other: Prepared) -> None:
        """Make a layer a companion no more."""
        self._strangers.add(other.number)
        self.members = [member for member in self.members if member is not other]

    def share(self, tokens: int) -> tuple[int, int]:
        """Return the address of the function that takes rows, and the room that its call takes, in numbers of 32 bits."""
        known = self._shares.get(tokens)
        if known is None:
            share = self._share(padded_token_count(tokens * self.planes))
            known = self._shares[tokens] = share.address, 2 * WORDS + sum(_scratch(self._words, tokens))
        return known

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return the product of x [..., columns], contiguous float32 or bfloat16, of few tokens, in its dtype; None if the
        parts have changed."""
        thread, place = _thread, x.data_ptr()
        if thread.waiting and (ready := thread.take(self, x, place)) is not None:
            return ready
        members, words, at, rows, size = self.members, thread.words, 0, 0, 0
        dtype, (*shape, columns) = x.dtype, x.shape
        tokens, results = x.numel() // columns, []
        for member in members:
            results.append(y := torch.empty((*shape, member.rows), dtype=dtype))
            words[at] = member.at
            words[at + 1], room = member.share(tokens)
            size += room
            words[at + 2] = y.data_ptr()
            at += MEMBER
            rows += member.rows
        work, started = rows * columns * tokens, perf_counter()
        threads = 1 if work <= ALONE or started < _crowd.until else torch_thread_count()
        given = thread.at, len(members), place, tokens, KINDS[dtype], *self._pattern, threads, thread.room(size)
        region = parallel_region()
        if not (_run(*given, region, _take().address) if region or threads == 1 else _run_by_numba(*given)):
            self.members = [self]
            return None
        if threads > 1:
            _crowd.watch(work, started, perf_counter() - started)
        thread.put(members, x, place, results)
        return results[0]


def address(tensor: Tensor | None) -> int:
    """Return where a tensor's elements are, or 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
