"""The definition of the trellis's search, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from seedpack._shapes import Float, Int, UInt8
from seedpack.kernels.common.bits import pack
from seedpack.kernels.trellis.code import TrellisCode

PADDING = 1 << 20  # stands for a value that no weight has
LIMIT = 600  # values beyond are no nearer to any code, and would spoil the exactness of the metrics
CLOSED, CEILING = 15 << 20, 16_000_000  # metric of a state that a walk cannot start from; that no metric exceeds
WRAP = 32  # weights at either end of a tail-biting row that decide the symbols where they meet


def table(code: TrellisCode, tag: int) -> Int[Tensor, "weights states"]:
    """Return the values of every window, times 2^⌈tag / 2⌉, so that squares leave `tag` low bits free: int64 [V, 2^L]."""
    return code.values(torch.arange(1 << code.state_bits)).T << -(-tag // 2)


def whole(values: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Round values to the code's unit, and limit them."""
    return values.round().clamp(-LIMIT, LIMIT)


class Boundary(NamedTuple):
    """How a walk starts and ends.

    `memory` int64 [rows]: the bits that the first window takes over; `last` int64 [rows, n]: the symbols that the walk ends
    with, n = 0 for any; `options` int64 [rows, options]: what the first of them may be, as no window but its own sees some
    of its bits.
    """

    memory: Tensor
    last: Tensor
    options: Tensor


class _Survivors:
    """The survivors of all rows: one per value of the newest m bits, with its metric and its older bits.

    Metrics are whole numbers whose low bits, 0 in `metric`, carry a tag through the minimum: the bits that stand above
    the state's own in the new state's memory. The lowest K of them say which predecessor a survivor came from.
    """

    def __init__(self, rows: int, code: TrellisCode, survivors: int) -> None:
        self.k, self.m, self.memory_mask = code.symbol_bits, survivors, code.memory_mask
        tag = code.tag_bits(survivors)
        self.tags, self.scale, self.table = 1 << tag, 1 << -(-tag // 2), table(code, tag)
        self.state = torch.arange(1 << self.m)
        self.metric = torch.zeros(rows, 1 << self.m, dtype=torch.int64)
        self.memory = self.state.repeat(rows, 1)  # the L - K newest bits
        self.history: list[Tensor] = []

    def close_but(self, memory: Tensor) -> None:
        """Rule out every state but that of one memory [rows]."""
        self.metric[:] = CLOSED
        newest = memory & ((1 << self.m) - 1)
        self.metric.scatter_(1, newest[:, None], 0)
        self.memory.scatter_(1, newest[:, None], memory[:, None])

    def step(self, x: Tensor) -> None:
        """Take one window; x [rows, V] are its weights' values."""
        symbols = 1 << self.k
        window = (self.memory[..., None] << self.k) + torch.arange(symbols)  # [rows, states, new symbol]
        tag = (self.memory >> (self.m - self.k)) & (self.tags - 1)
        cost = (self.metric + tag)[..., None] + self._error(window, x)
        best = cost.view(len(cost), symbols, -1).amin(1).clamp_max(CEILING)  # predecessors differ in their top K bits
        tag = best & (self.tags - 1)
        self.metric = (best - tag) - (best.amin(1, True) & -self.tags)
        self.memory = ((tag << self.m) | self.state) & self.memory_mask
        self.history.append(tag & (symbols - 1))

    def extend(self, x: Tensor, symbols: Tensor) -> None:
        """Take one window with each of some symbols [rows, options]: all go on, none is weighed against another."""
        window = (self.memory[..., None] << self.k) | symbols[:, None]
        self.metric = (self.metric[..., None] + self._error(window, x)).flatten(1)
        self.memory = (window & self.memory_mask).flatten(1)

    def best(self) -> Tensor:
        """Return which survivor has the least metric, the first of several: [rows]."""
        count = self.metric.shape[1]
        return (self.metric * count + torch.arange(count)).amin(1) % count

    def _error(self, window: Tensor, x: Tensor) -> Tensor:
        error = torch.zeros_like(window)
        for wanted, values in zip(x.unbind(1), self.table, strict=True):
            wanted = wanted.view(-1, *[1] * (window.ndim - 1))
            error += torch.where(wanted == PADDING, 0, (wanted * self.scale - values[window]).square())
        return error

    def trace(self, state: Tensor) -> Tensor:
        """Return the symbols on the way to a state [rows], oldest first."""
        out = []
        for symbols in reversed(self.history):
            out.append(state & ((1 << self.k) - 1))
            symbol = symbols.gather(1, state[:, None])[:, 0]
            state = (symbol << (self.m - self.k)) | (state >> self.k)
        return torch.stack(out[::-1], 1)


Walk = Callable[[Tensor, TrellisCode, int, Boundary | None], Tensor]


def walk(
    x: Int[Tensor, "rows steps weights"], code: TrellisCode, survivors: int, boundary: Boundary | None = None
) -> Int[Tensor, "rows steps"]:
    """Find the symbols of least error over the steps, int64, oldest first; see `search`.

    Args:
        x: int64 [rows, steps, V], whole values in the code's units, or `PADDING`.
        code: the code that is searched.
        survivors: m, of the 2^m paths that survive a step.
        boundary: how the walk starts and ends; None: anyhow.
    """
    paths = _Survivors(len(x), code, survivors)
    count = 0 if boundary is None else boundary.last.shape[1]
    if boundary is not None:
        paths.close_but(boundary.memory)
    for step in range(x.shape[1] - count):
        paths.step(x[:, step])
    if boundary is None or not count:
        return paths.trace(paths.best())
    for i in range(count):
        paths.extend(x[:, x.shape[1] - count + i], boundary.last[:, i : i + 1] if i else boundary.options)
    best, options = paths.best(), boundary.options.shape[1]
    first = boundary.options.gather(1, best[:, None] % options)
    return torch.cat((paths.trace(best // options), first, boundary.last[:, 1:]), 1)


def search(
    values: Float[Tensor, "rows padded"], code: TrellisCode, survivors: int, columns: int, walk: Walk = walk
) -> UInt8[Tensor, "rows groups bytes"]:
    """Find for each row a stream of little squared error Σ_t (values[t] - v_t)² over the first `columns` weights.

    Viterbi's algorithm from the row's last weight to its first (a window's newest bits are its lowest) over the
    2^m values of the newest m bits, each survivor with the older bits of its own path: for m = L - K the
    exact minimum from a given start, for less a reduced-state search (Duel-Hallen and Heegard, 1989; Eyuboglu
    and Qureshi, 1988) of the same code. Where the code is tail-biting, a walk over `WRAP` weights at either end of a row,
    its last ones before its first, decides the symbols where they meet; then a walk over the row starts from them and ends
    with them (QTIP, arXiv 2406.11235, Alg. 4, walks twice over the whole sequence).

    All metrics are whole numbers below 2^24, so every backend finds the same stream.

    Args:
        values: [rows, a multiple of 8], in units of the code's values; those beyond `columns` are not looked at.
        code: the code that is searched.
        survivors: m, from K to L - K, and not below L - K - 8.
        columns: weights of a row.
        walk: finds the symbols.
    """
    x = in_walk_order(values, columns, code.weights)
    if not code.tail_biting:
        return pack(walk(x, code, survivors, zero_boundary(x)).flip(1), code.symbol_bits)
    near = min(WRAP // code.weights, x.shape[1])
    ends = walk(torch.cat((x[:, -near:], x[:, :near]), 1), code, survivors, None)
    boundary = tail_biting_boundary(ends[:, :near], code)
    return pack(walk(x, code, survivors, boundary).flip(1), code.symbol_bits)


def in_walk_order(values: Tensor, columns: int, weights: int) -> Int[Tensor, "rows steps weights"]:
    """Return `whole` values from a row's last window to its first, int64; those beyond `columns` are `PADDING`."""
    x = whole(values).to(torch.int64)
    x[:, columns:] = PADDING
    return x.view(len(x), -1, weights).flip(1)


def zero_boundary(rows: Tensor) -> Boundary:
    """Return the start of streams that run on at zeros, one for each of the rows; they end anyhow."""
    memory = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    return Boundary(memory, memory[:, None][:, :0], memory[:, None])


def tail_biting_boundary(symbols: Tensor, code: TrellisCode) -> Boundary:
    """Return the boundary of tail-biting streams whose walks end (at the first weights of a row) with some symbols
    [rows, steps]."""
    count = code.memory_symbols
    last = symbols[:, symbols.shape[1] - count :].to(torch.int64)
    seen = code.state_bits - code.symbol_bits * count  # bits of the first of them that other windows see too
    free = torch.arange(1 << (code.symbol_bits - seen), device=last.device) << seen
    memory = windows_of(torch.zeros_like(last[:, 0]), last, code)[1]
    return Boundary(memory, last, (last[:, :1] & ((1 << seen) - 1)) | free)


def windows_of(memory: Tensor, symbols: Tensor, code: TrellisCode) -> tuple[Int[Tensor, "rows steps"], Tensor]:
    """Return the windows of symbols [rows, steps], oldest first, that follow a memory [rows], and the memory then."""
    windows = []
    for symbol in symbols.unbind(1):
        windows.append((memory << code.symbol_bits) | symbol)
        memory = windows[-1] & code.memory_mask
    return torch.stack(windows, 1), memory
