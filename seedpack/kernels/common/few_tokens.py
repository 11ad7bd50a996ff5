"""The product of few tokens on CPUs, in one call: mix, round to 8 or 16 bits, multiply by the packed rows.

What does not change from call to call is prepared once, as words in memory. The product itself is the codec's: a function that
takes rows until none is left, run by several threads. Integers are exact; each group of 256 is scaled in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count as numbers
from time import perf_counter
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seedpack.kernels.common.activations import FLOAT32, KINDS, Layout, read_floats, round_token, write_floats
from seedpack.kernels.common.byte_dots import pattern, way
from seedpack.kernels.common.companions import (
    COPY,
    DONE,
    FIRST,
    MOST,
    NEIGHBOUR,
    NO_ROOM,
    NOTHING,
    PARTED,
    RESULT,
    RESULTS,
    ROOM,
    ROOM_SIZE,
    STALE,
    Thread,
    keep,
    take,
)
from seedpack.kernels.common.crowd import Crowd, too_long
from seedpack.kernels.common.jit import jit, torch_thread_count
from seedpack.kernels.common.memory import array, call_at, call_together, on_stack
from seedpack.kernels.common.native import Native
from seedpack.kernels.common.openmp import parallel_region
from seedpack.kernels.common.row_tiles import FEW_TOKENS, Product, padded_token_count
from seedpack.kernels.common.vectors import LANES
from seedpack.kernels.rotation.cpu import mix_row

ALONE = 1 << 16  # weights, times tokens, up to which one thread is faster than two
PIECES = 2, 16  # of a layer's rows for each thread, at least and at most
PIECE = 1 << 17  # weights of a piece at least, where there are more pieces than the least

# Words of a layer; the codec's own are at CODE. Behind them, for each part that it was prepared from: its address, that of a
# copy, and their bytes.
ROWS, COLUMNS, PLANES, FACTOR, ODD, SMALL, ORDER, SCALE, BIAS, CODE = range(10)
PADDED, GROUP, PLANE_WORDS, WEIGHTS, BLOCK, CENTRE, OFFSETS, COPIES, KEPT_FIRST = 10, 11, 12, 13, 14, 15, 16, 18, 19
# Words of a call. NEXT, the row that is taken next, is written to by all threads and has a line of its own.
NEXT, LAYER, CODES, STARTS, STEPS, OUT, TOKENS, KIND, STEP, WORDS = 0, 8, 9, 10, 11, 12, 13, 14, 15, 16
# Words of a plan, of what a layer and its companions compute together for a count of tokens: how many they are, the room that
# they take in numbers of 32 bits, what codes are multiplied with (see `byte_dots.pattern`), torch's threads and what these call;
# then for each its words, its product and its number.
COUNT, OF_TOKENS, ACTIVATIONS, PLAN_ROOM, MASK, PATTERN, REGION, ROWS_LEFT, MEMBERS = range(9)
MEMBER = 3
ROWS_AT_ONCE = 32  # whose products are kept before they are stored

on_row, two_words = on_stack(4 * ROWS_AT_ONCE), on_stack(16)


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


@jit(inner=True)
def _lines(count: int) -> int:
    """Return so many numbers of 32 bits, rounded up to lines of memory."""
    return -(-count // LANES) * LANES


@jit()
def _scratch(layer: Any, tokens: int) -> tuple[int, int, int, int, int]:
    """Return how many numbers of 32 bits the codes of a layer's call take, the starts of its sums, the steps, the activations
    with what mixing them takes, for a power of two of tokens and planes, and the result or a copy of the activations."""
    all_tokens = 1
    while all_tokens < tokens * layer[PLANES]:
        all_tokens *= 2
    groups = -(-layer[PADDED] // layer[GROUP])
    codes, starts = all_tokens * layer[PLANE_WORDS], all_tokens * groups * LANES
    floats, results = layer[PADDED] + 2 * layer[COLUMNS], tokens * max(layer[ROWS], layer[COLUMNS])
    return codes, starts, _lines(all_tokens * groups), _lines(floats), _lines(results)


@jit(inner=True)
def _begin(plan_at: int, x: int, y: int, kind: int, threads: int, thread_at: int) -> bool:
    """Mix and round the activations at x for each member of a plan. The words of the calls, and what they point into, go into the
    thread's room, with a place for a copy of the activations and for the results of all but the first, which goes to y.

    Returns whether the members' parts are still the same; if not, nothing is to be run.
    """
    plan = array(plan_at, np.int64, MEMBERS + MEMBER * MOST)
    thread = array(thread_at, np.int64, RESULTS + RESULT * MOST)
    count, tokens, room = plan[COUNT], plan[OF_TOKENS], thread[ROOM]
    at = room + 8 * WORDS * count
    for m in range(count):
        layer_at, call = plan[MEMBERS + MEMBER * m], array(room + 8 * WORDS * m, np.int64, WORDS)
        layer = array(layer_at, np.int64, KEPT_FIRST)
        if _stale(array(layer_at, np.int64, KEPT_FIRST + 3 * layer[COPIES])):
            return False
        columns, padded, planes = layer[COLUMNS], layer[PADDED], layer[PLANES]
        codes, starts, steps, floats, results = _scratch(layer, tokens)
        call[NEXT], call[LAYER], call[OUT] = 0, layer_at, y
        call[TOKENS], call[KIND] = tokens, kind
        call[CODES], call[STARTS], call[STEPS] = at, at + 4 * codes, at + 4 * (codes + starts)
        least, most = layer[ROWS] // (PIECES[1] * threads), layer[ROWS] // (PIECES[0] * threads)
        call[STEP] = max(1, min(most, max(least, PIECE // columns))) if threads > 1 else layer[ROWS]
        mixed = at + 4 * (codes + starts + steps)
        work, at = mixed + 4 * padded, mixed + 4 * floats
        if m == 0:
            thread[COPY] = at
        else:
            result = RESULTS + RESULT * (m - 1)
            thread[result], thread[result + 1] = plan[MEMBERS + MEMBER * m + 2], at
            thread[result + 2] = tokens * layer[ROWS] * (4 if kind == FLOAT32 else 2)
            call[OUT] = at
        at += 4 * results
        groups, values = planes * -(-padded // layer[GROUP]), array(mixed, np.float32, padded)
        for t in range(tokens):
            read_floats(x, kind, t * columns, mixed, columns)
            for i in range(columns, padded):
                values[i] = 0
            if layer[FACTOR]:
                times = array(layer[FACTOR], np.float32, columns)
                for i in range(columns):
                    values[i] *= times[i]
                mix_row(mixed, columns, layer[ODD], layer[SMALL], layer[ORDER], work)
            round_token(
                mixed, padded, layer[WEIGHTS], planes, call[CODES] + 4 * t * planes * layer[PLANE_WORDS],
                call[STARTS] + 4 * LANES * t * groups, call[STEPS] + 4 * t * groups,
                (layer[OFFSETS], layer[OFFSETS + 1]), plan[MASK], plan[PATTERN], layer[GROUP], layer[PLANE_WORDS],
                layer[BLOCK], layer[CENTRE],
            )  # fmt: skip
    return True


@jit(inner=True)
def _multiply(plan_at: int, room: int) -> None:
    """Take rows of each member's layer in turn, until none is left."""
    plan = array(plan_at, np.int64, MEMBERS + MEMBER * MOST)
    for m in range(plan[COUNT]):
        call_at(plan[MEMBERS + MEMBER * m + 1], room + 8 * WORDS * m)


@cache
def _rows_left() -> Native:
    def rows_left(at: int) -> int:
        """Multiply by the rows that are left of the calls whose plan and room are named at an address."""
        words = array(at, np.int64, 2)
        _multiply(words[0], words[1])
        return 0

    return Native(rows_left, "rows-left")


@jit(inner=True)
def _start(plan_at: int, x: int, y: int, size: int, kind: int, threads: int, thread_at: int) -> int:
    """Store at y what waits for the first of a plan, or begin; returns NOTHING where rows are to be multiplied now."""
    plan, thread = array(plan_at, np.int64, MEMBERS + MEMBER), array(thread_at, np.int64, RESULTS)
    found = take(thread_at, plan[MEMBERS + 2], x, size, kind, y)
    if found != NOTHING:
        return found
    if thread[ROOM_SIZE] < plan[PLAN_ROOM]:
        return NO_ROOM
    return NOTHING if _begin(plan_at, x, y, kind, threads, thread_at) else STALE


@jit()
def _run(plan_at: int, x: int, y: int, kind: int, threads: int, thread_at: int) -> int:
    """Store at y the product of the activations at x by the first layer of a plan, computed on one thread or on torch's together
    with those of the others, which wait in the thread's room; or what waits already. Returns how it ended, see `companions`."""
    plan, room = array(plan_at, np.int64, MEMBERS + MEMBER), array(thread_at, np.int64, RESULTS)[ROOM]
    size = plan[ACTIVATIONS] * (4 if kind == FLOAT32 else 2)
    found = _start(plan_at, x, y, size, kind, threads, thread_at)
    if found != NOTHING:
        return found
    if threads == 1:
        _multiply(plan_at, room)
    else:
        at = two_words()
        given = array(at, np.int64, 2)
        given[0], given[1] = plan_at, room
        call_together(plan[REGION], plan[ROWS_LEFT], at, threads)
    return keep(thread_at, plan[MEMBERS + 2], plan[COUNT], x, size, kind)


@jit(parallel=True)
def _run_by_numba(plan_at: int, x: int, y: int, kind: int, threads: int, thread_at: int) -> int:
    """Do as `_run`, on Numba's threads."""
    plan, room = array(plan_at, np.int64, MEMBERS + MEMBER), array(thread_at, np.int64, RESULTS)[ROOM]
    size = plan[ACTIVATIONS] * (4 if kind == FLOAT32 else 2)
    found = _start(plan_at, x, y, size, kind, threads, thread_at)
    if found != NOTHING:
        return found
    for _ in prange(threads):
        _multiply(plan_at, room)
    return keep(thread_at, plan[MEMBERS + 2], plan[COUNT], x, size, kind)


_thread, _crowd, _numbers = Thread(), Crowd(), numbers()
_layers: WeakValueDictionary[int, Prepared] = (
    WeakValueDictionary()
)  # by their numbers, of which none is ever given again


@dataclass(frozen=True, slots=True)
class _Plan:
    """The work of a layer and its companions for a count of tokens.

    Attributes:
        at: the address of its words; `held`: they, and the members.
        room: numbers of 32 bits that it takes.
        shared: it is worth several threads.
        late: seconds that are too long for it on several.
        torchs: the threads are torch's.
    """

    at: int
    held: object
    room: int
    shared: bool
    late: float
    torchs: bool


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
        self.rows, self.columns, self.planes = rows, columns, planes
        self._share, self._pattern = share, pattern(way(), layout.weights)
        self.most_tokens, self._number = FEW_TOKENS // planes, next(_numbers)
        self.members = [self]  # this, and its companions
        self._plans: dict[int, _Plan] = {}  # by tokens
        self._strangers: set[int] = set()  # former companions
        _layers[self._number] = self

    def _set_members(self, members: list[Prepared]) -> None:
        self.members, self._plans = members, {}

    def _join(self, other: Prepared) -> bool:
        """Make a layer a companion, unless it has been one, or has other activations."""
        if other.columns != self.columns or other.planes != self.planes or other._number in self._strangers:
            return False
        if other not in self.members:
            if len(self.members) == MOST:
                return False
            self._set_members([*self.members, other])
        return True

    def _part_with(self, number: int) -> None:
        """Make a layer a companion no more."""
        self._strangers.add(number)
        self._set_members([member for member in self.members if member._number != number])

    def _plan(self, tokens: int) -> _Plan:
        members, region = self.members, parallel_region()
        room = sum(2 * WORDS + sum(_scratch(member._words, tokens)) for member in members)
        words = [len(members), tokens, tokens * self.columns, room, *self._pattern, region, _rows_left().address]
        for member in members:
            product = member._share(padded_token_count(tokens * self.planes))
            words += [member._words.ctypes.data, product.address, member._number]
        held = np.array(words + [0] * MEMBER * (MOST - len(members)), np.int64)
        work = tokens * self.columns * sum(member.rows for member in members)
        plan = _Plan(held.ctypes.data, (held, members), room, work > ALONE, too_long(work), region != 0)
        self._plans[tokens] = plan
        return plan

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return the product of x [..., columns], contiguous float32 or bfloat16, of few tokens, in its dtype; None if the
        parts have changed."""
        tokens = x.numel() // self.columns
        plan = self._plans.get(tokens) or self._plan(tokens)
        y = torch.empty((*x.shape[:-1], self.rows), dtype=x.dtype)
        started = perf_counter()
        threads = torch_thread_count() if plan.shared and started >= _crowd.until else 1
        run = _run if plan.torchs or threads == 1 else _run_by_numba
        end = run(plan.at, x.data_ptr(), y.data_ptr(), KINDS[x.dtype], threads, _thread.at)
        if threads > 1 and (took := perf_counter() - started) > plan.late:
            _crowd.late(started, took)
        return y if end == DONE else self._settle(end, x, y, plan)

    def _settle(self, end: int, x: Tensor, y: Tensor, plan: _Plan) -> Tensor | None:
        """Do what a call asks for that did not just end, and call again where nothing was computed."""
        thread, leader = _thread, _layers.get(_thread.words[FIRST])
        if end == NEIGHBOUR:
            if leader is None or not leader._join(self):
                thread.words[FIRST] = self._number
            return y
        if end == STALE:
            self._set_members([self])
            return None
        if end == NO_ROOM:
            thread.make_room(plan.room)
        elif end == PARTED:
            for number in thread.parted():
                if leader is not None:
                    leader._part_with(number)
        return self(x)


def address(tensor: Tensor | None) -> int:
    """Return where a tensor's elements are, or 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
