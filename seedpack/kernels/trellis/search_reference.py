"""The definition of the trellis's search, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from seedpack._shapes import Float, Int, UInt8
from seedpack.kernels.common.bits import pack
from seedpack.prng import trellis_multiplier, trellis_values

PADDING = 1 << 20  # stands for a value that no weight has
LIMIT = 600  # values beyond are no nearer to any code, and would spoil the exactness of the metrics
CLOSED, CEILING = 15 << 20, 16_000_000  # metric of a state that a walk cannot start from; that no metric exceeds
WRAP = 32  # weights on either side of the seam that decide the state there


def tag_bits(code_bits: int, state_bits: int, survivors: int) -> int:
    """Low bits of a metric that carry the bits next above a state's own: w = max(k, L - k - m), at most 8."""
    return max(code_bits, state_bits - code_bits - survivors)


def seam_symbols(code_bits: int, state_bits: int) -> int:
    """Symbols that reach into the windows of others across the seam: ceil((L - k) / k)."""
    return -(-(state_bits - code_bits) // code_bits)


def table(code_bits: int, state_bits: int, key: int, tag: int) -> Int[Tensor, " states"]:
    """The value of every window, times 2^⌈tag / 2⌉, so that squares leave `tag` low bits free: int64 [2^L]."""
    values = trellis_values(torch.arange(1 << state_bits), trellis_multiplier(code_bits, state_bits), key)
    return values << -(-tag // 2)


def whole(values: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Values rounded to the code's unit, and limited."""
    return values.round().clamp(-LIMIT, LIMIT)


class Code(NamedTuple):
    """What a search is told of a code: k, L, its key c, and m, of 2^m survivors."""

    code_bits: int
    state_bits: int
    key: int
    survivors: int

    @property
    def tag(self) -> int:
        """`tag_bits`."""
        return tag_bits(self.code_bits, self.state_bits, self.survivors)

    @property
    def memory(self) -> int:
        """Mask of the L - k bits that the next window takes over."""
        return (1 << (self.state_bits - self.code_bits)) - 1


class Seam(NamedTuple):
    """What a walk starts from and ends with.

    `memory` int64 [rows] of the first window; `given` int64 [rows, n], the last symbols, n = 0 for any; `oldest` int64
    [rows, options], what the first of them may be.
    """

    memory: Tensor
    given: Tensor
    oldest: Tensor


class _Survivors:
    """The survivors of all rows: one for each value of the newest m bits, with its metric and its older bits.

    Metrics are whole numbers whose low bits, 0 in `metric`, carry a tag through the minimum: the bits that stand above
    the state's own in the new state's memory. The lowest k of them say which predecessor a survivor came from.
    """

    def __init__(self, rows: int, code: Code) -> None:
        self.k, self.m, self.memory_mask = code.code_bits, code.survivors, code.memory
        self.tags = 1 << code.tag
        self.table = table(code.code_bits, code.state_bits, code.key, code.tag)
        self.state = torch.arange(1 << self.m)
        self.metric = torch.zeros(rows, 1 << self.m, dtype=torch.int64)
        self.memory = self.state.repeat(rows, 1)  # the L - k newest bits
        self.history: list[Tensor] = []

    def close_but(self, memory: Tensor) -> None:
        """Rule out every state but that of one memory [rows]."""
        self.metric[:] = CLOSED
        newest = memory & ((1 << self.m) - 1)
        self.metric.scatter_(1, newest[:, None], 0)
        self.memory.scatter_(1, newest[:, None], memory[:, None])

    def step(self, x: Tensor) -> None:
        """One weight; x [rows] is its value."""
        symbols = 1 << self.k
        window = (self.memory[..., None] << self.k) + torch.arange(symbols)  # [rows, states, new symbol]
        tag = (self.memory >> (self.m - self.k)) & (self.tags - 1)
        cost = (self.metric + tag)[..., None] + self._error(window, x)
        best = cost.view(len(cost), symbols, -1).amin(1).clamp_max(CEILING)  # predecessors differ in their top k bits
        tag = best & (self.tags - 1)
        self.metric = (best - tag) - (best.amin(1, True) & -self.tags)
        self.memory = ((tag << self.m) | self.state) & self.memory_mask
        self.history.append(tag & (symbols - 1))

    def extend(self, x: Tensor, symbols: Tensor) -> None:
        """One weight with each of some symbols [rows, options]: all go on, none is weighed against another."""
        window = (self.memory[..., None] << self.k) | symbols[:, None]
        self.metric = (self.metric[..., None] + self._error(window, x)).flatten(1)
        self.memory = (window & self.memory_mask).flatten(1)

    def best(self) -> Tensor:
        """Which has the least metric, the first of several: [rows]."""
        count = self.metric.shape[1]
        return (self.metric * count + torch.arange(count)).amin(1) % count

    def _error(self, window: Tensor, x: Tensor) -> Tensor:
        scale = 1 << -(-(self.tags.bit_length() - 1) // 2)
        x = x.view(-1, *[1] * (window.ndim - 1))
        return torch.where(x == PADDING, 0, (x * scale - self.table[window]).square())

    def trace(self, state: Tensor) -> Tensor:
        """The symbols on the way to a state [rows], oldest first."""
        out = []
        for symbols in reversed(self.history):
            out.append(state & ((1 << self.k) - 1))
            symbol = symbols.gather(1, state[:, None])[:, 0]
            state = (symbol << (self.m - self.k)) | (state >> self.k)
        return torch.stack(out[::-1], 1)


Walk = Callable[[Tensor, Code, Seam | None], Tensor]


def walk(x: Int[Tensor, "rows steps"], code: Code, seam: Seam | None = None) -> Int[Tensor, "rows steps"]:
    """The symbols of least error over the steps, int64, oldest first; see `search`.

    Args:
        x: int64, whole values in the code's units, or `PADDING`.
        code: what is searched, and how many survive a step.
        seam: how the walk starts and ends; None: anyhow.
    """
    survivors = _Survivors(len(x), code)
    count = 0 if seam is None else seam.given.shape[1]
    if seam is not None:
        survivors.close_but(seam.memory)
    for step in range(x.shape[1] - count):
        survivors.step(x[:, step])
    if seam is None or not count:
        return survivors.trace(survivors.best())
    for i in range(count):
        survivors.extend(x[:, x.shape[1] - count + i], seam.given[:, i : i + 1] if i else seam.oldest)
    found, options = survivors.best(), seam.oldest.shape[1]
    oldest = seam.oldest.gather(1, found[:, None] % options)
    return torch.cat((survivors.trace(found // options), oldest, seam.given[:, 1:]), 1)


def search(
    values: Float[Tensor, "rows padded"],
    code: Code,
    columns: int,
    circular: bool,
    walk: Walk = walk,
) -> UInt8[Tensor, "rows groups bytes"]:
    """For each row a stream of little squared error Σ_t (values[t] - v_t)² over the first `columns` weights.

    Viterbi's algorithm from the row's last weight to its first (a window's newest bits are its lowest) over the
    2^m values of the newest m bits, each survivor with the older bits of its own path: for m = L - k the
    exact minimum from a given start, for less a reduced-state search (Duel-Hallen and Heegard, 1989; Eyuboglu
    and Qureshi, 1988) of the same code. Where a row's stream is circular, a walk over `WRAP` weights on either side of the
    seam decides the symbols there, then a walk over the row starts from them and ends with them (QTIP, arXiv
    2406.11235, Alg. 4, walks twice over the whole sequence).

    All metrics are whole numbers below 2^24, so every backend finds the same stream.

    Args:
        values: [rows, a multiple of 8], in units of the code's values; those beyond `columns` are not looked at.
        code: what is searched; m from k to L - k, and not below L - k - 8.
        columns: weights of a row.
        circular: whether a stream runs on at its own beginning, or at zeros.
        walk: what does the work.
    """
    x = in_walk_order(values, columns)
    if not circular:
        return pack(walk(x, code, from_zeros(x)).flip(1), code.code_bits)
    near = min(WRAP, values.shape[1])
    seam = closed(walk(torch.cat((x[:, -near:], x[:, :near]), 1), code, None)[:, :near], code)
    return pack(walk(x, code, seam).flip(1), code.code_bits)


def in_walk_order(values: Tensor, columns: int) -> Int[Tensor, "rows padded"]:
    """`whole` values from the last of a row to its first, int64; those beyond `columns` are `PADDING`."""
    x = whole(values).to(torch.int64)
    x[:, columns:] = PADDING
    return x.flip(1)


def from_zeros(rows: Tensor) -> Seam:
    """The start of streams that run on at zeros, one for each of some rows; they end anyhow."""
    memory = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    return Seam(memory, memory[:, None][:, :0], memory[:, None])


def closed(symbols: Tensor, code: Code) -> Seam:
    """The seam of a circular stream whose walk ends (at the first weights of a row) with some symbols [rows, steps]."""
    count = seam_symbols(code.code_bits, code.state_bits)
    given = symbols[:, symbols.shape[1] - count :].to(torch.int64)
    below = code.state_bits - code.code_bits * count  # bits of the oldest given symbol that others' windows see
    free = torch.arange(1 << (code.code_bits - below), device=given.device) << below
    memory = windows_of(torch.zeros_like(given[:, 0]), given, code)[1]
    return Seam(memory, given, (given[:, :1] & ((1 << below) - 1)) | free)


def windows_of(memory: Tensor, symbols: Tensor, code: Code) -> tuple[Int[Tensor, "rows steps"], Tensor]:
    """The windows of weights whose symbols [rows, steps], oldest first, follow a memory [rows], and the memory then."""
    windows = []
    for symbol in symbols.unbind(1):
        windows.append((memory << code.code_bits) | symbol)
        memory = windows[-1] & code.memory
    return torch.stack(windows, 1), memory
