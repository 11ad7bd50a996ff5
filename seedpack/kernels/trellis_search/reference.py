"""The definition of the trellis's search, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack._shapes import Float, Int, UInt8
from seedpack.kernels.bits import pack
from seedpack.prng import trellis_multiplier, trellis_values

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


def units(values: Float[Tensor, "rows columns"], tag: int) -> Float[Tensor, "rows columns"]:
    """Values rounded to the code's unit, limited, times the table's factor: whole numbers in float32."""
    return values.round().clamp(-LIMIT, LIMIT).float() * (1 << -(-tag // 2))


class _Walk:
    """The survivors of all rows: one for each value of the newest m bits, with its metric and its older bits.

    Metrics are whole numbers whose low bits, 0 in `metric`, carry a tag through the minimum: the bits that stand above
    the state's own in the new state's memory. The lowest k of them say which predecessor a survivor came from.
    """

    def __init__(self, rows: int, code_bits: int, state_bits: int, key: int, survivors: int) -> None:
        self.k, self.m, self.memory_bits = code_bits, survivors, state_bits - code_bits
        self.tags = 1 << tag_bits(code_bits, state_bits, survivors)
        self.table = table(code_bits, state_bits, key, self.tags.bit_length() - 1)
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

    def step(self, x: Tensor | None) -> None:
        """One weight; x [rows] is its value, None for padding."""
        symbols = 1 << self.k
        window = (self.memory[..., None] << self.k) + torch.arange(symbols)  # [rows, states, new symbol]
        tag = (self.memory >> (self.m - self.k)) & (self.tags - 1)
        cost = (self.metric + tag)[..., None] + self._error(window, x)
        best = cost.view(len(cost), symbols, -1).amin(1).clamp_max(CEILING)  # predecessors differ in their top k bits
        tag = best & (self.tags - 1)
        self.metric = (best - tag) - (best.amin(1, True) & -self.tags)
        self.memory = ((tag << self.m) | self.state) & ((1 << self.memory_bits) - 1)
        self.history.append(tag & (symbols - 1))

    def extend(self, x: Tensor | None, symbols: Tensor) -> None:
        """One weight with each of some symbols [rows, options]: all go on, none is weighed against another."""
        window = (self.memory[..., None] << self.k) | symbols[:, None]
        self.metric = (self.metric[..., None] + self._error(window, x)).flatten(1)
        self.memory = (window & ((1 << self.memory_bits) - 1)).flatten(1)

    def best(self) -> Tensor:
        """Which has the least metric, the first of several: [rows]."""
        count = self.metric.shape[1]
        return (self.metric * count + torch.arange(count)).amin(1) % count

    def _error(self, window: Tensor, x: Tensor | None) -> Tensor:
        if x is None:
            return torch.zeros_like(window)
        return (x.to(torch.int64).view(-1, *[1] * (window.ndim - 1)) - self.table[window]).square()

    def trace(self, state: Tensor, steps: int) -> Tensor:
        """The newest `steps` symbols on the way to a state [rows], oldest first."""
        out = []
        for symbols in reversed(self.history[-steps:]):
            out.append(state & ((1 << self.k) - 1))
            symbol = symbols.gather(1, state[:, None])[:, 0]
            state = (symbol << (self.m - self.k)) | (state >> self.k)
        return torch.stack(out[::-1], 1)


def search(
    values: Float[Tensor, "rows padded"], code_bits: int, state_bits: int, key: int, survivors: int, columns: int
) -> UInt8[Tensor, "rows groups bytes"]:
    """For each row a stream of little squared error Σ_t (values[t] - v_t)² over the first `columns` weights.

    Viterbi's algorithm from the row's last weight to its first (a window's newest bits are its lowest) over the
    2^m values of the newest m bits, each survivor with the older bits of its own path: for m = L - k the
    exact minimum from a given start, for less a reduced-state search (Duel-Hallen and Heegard, 1989; Eyuboglu
    and Qureshi, 1988) of the same code. A row's stream is circular: a walk over `WRAP` weights on either side of the
    seam decides the symbols there, then a walk over the row starts from them and ends with them (QTIP, arXiv
    2406.11235, Alg. 4, walks twice over the whole sequence).

    All metrics are whole numbers below 2^24, so every backend finds the same stream.

    Args:
        values: [rows, a multiple of 8], in units of the code's values; those beyond `columns` are not looked at.
        code_bits: k.
        state_bits: L.
        key: c.
        survivors: m, from k to L - k, and not below L - k - 8.
        columns: weights of a row.
    """
    padded = values.shape[1]
    x = units(values, tag_bits(code_bits, state_bits, survivors)).flip(1)
    padding = padded - columns
    near, seam = min(WRAP, padded), seam_symbols(code_bits, state_bits)

    def column(step: int) -> Tensor | None:
        return None if step < padding else x[:, step]

    around = _Walk(len(values), code_bits, state_bits, key, survivors)
    for step in (*range(padded - near, padded), *range(near)):
        around.step(column(step))
    given = around.trace(around.best(), 2 * near)[:, near - seam : near].clone()
    memory = torch.zeros(len(values), dtype=torch.int64)
    for i in range(seam):
        memory = ((memory << code_bits) | given[:, i]) & ((1 << state_bits - code_bits) - 1)

    below = state_bits - code_bits - code_bits * (seam - 1)  # bits of the oldest given symbol that others' windows see
    free = torch.arange(1 << (code_bits - below)) << below
    oldest = (given[:, :1] & ((1 << below) - 1)) | free

    walk = _Walk(len(values), code_bits, state_bits, key, survivors)
    walk.close_but(memory)
    for step in range(padded - seam):
        walk.step(column(step))
    for i in range(seam):
        walk.extend(column(padded - seam + i), given[:, i : i + 1] if i else oldest)
    found = walk.best()
    given[:, 0] = oldest.gather(1, found[:, None] % len(free))[:, 0]
    symbols = torch.cat((walk.trace(found // len(free), padded - seam), given), 1)
    return pack(symbols.flip(1), code_bits)
