"""Trellis decoding on the CPU: the reference's integers, 16 windows per vector, rows shared among the cores.

For 16 windows of a row: a load of their bytes, a shuffle that gives each lane the four bytes its window starts in, a
shift, a mask, a multiplication and an addition; for each weight of theirs the bytes' sum (3 instructions with AVX-512, 7
without) and a conversion.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from torch import Tensor

from seedpack.kernels.common.jit import jit
from seedpack.kernels.common.vectors import (
    FLOATS,
    I8,
    I64,
    INTS,
    LANES,
    ROWS_AT_ONCE,
    byte_sums,
    data,
    interleaved,
    intrinsic,
    nearest,
    splat,
    spread,
    store,
    words_at,
)
from seedpack.kernels.trellis.bytes_reference import LARGEST, steps_of_one
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.prng import TRELLIS_SUMS


def window_values(
    builder: Any, row: Any, group: Any, symbol_bits: int, weights: int, mask: Any, multiplier: Any, key: Any
) -> list[Any]:
    """Emit IR for the values of windows 16·group … 16·group + 15 of a row, as floats: a vector for each weight of a window."""
    start = builder.gep(row, [builder.mul(group, ir.Constant(I64, 2 * symbol_bits))])
    words = words_at(builder, start, symbol_bits, 20)
    window = builder.and_(words, spread(builder, mask, INTS))
    mixed = builder.add(builder.mul(window, spread(builder, multiplier, INTS)), spread(builder, key, INTS))
    return [
        builder.sitofp(byte_sums(builder, mixed, -offset, factors), FLOATS) for factors, offset in TRELLIS_SUMS[weights]
    ]


@intrinsic
def _decode16(
    context: Any, bits: Any, per_window: Any, row: Any, group: Any, mask: Any, multiplier: Any, key: Any, scale: Any, out: Any, at: Any
) -> Any:  # fmt: skip
    """Store scale·values of a group of 16 windows in out, from `at` on: float32, or rounded to int8."""
    signature = types.void(bits, per_window, row, types.int64, *(types.uint32,) * 3, types.float32, out, types.int64)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        row_at, out_at = (data(ctx, builder, signature.args[i], args[i]) for i in (2, 8))
        values = window_values(builder, row_at, args[3], bits.count, per_window.count, *args[4:7])
        for i, vector in enumerate(interleaved(builder, values)):
            scaled = builder.fmul(vector, spread(builder, args[7], FLOATS))
            if signature.args[8].dtype == types.int8:
                whole = builder.fptosi(nearest(builder, scaled), INTS)
                for sign, bound in ((">", splat(INTS, LARGEST)), ("<", splat(INTS, -LARGEST))):
                    whole = builder.select(builder.icmp_signed(sign, whole, bound), bound, whole)
                scaled = builder.trunc(whole, ir.VectorType(I8, LANES))
            store(builder, scaled, builder.gep(out_at, [builder.add(args[9], ir.Constant(I64, i * LANES))]))
        return ctx.get_dummy_value()

    return signature, codegen


@jit()
def load_bytes(symbol_bits: int) -> int:
    """Return the bytes that a group's load takes: `words_at`'s, for windows of up to 20 bits."""
    return 16 if symbol_bits <= 6 else 32


@jit()
def whole_groups(size: int, symbol_bits: int) -> int:
    """Count the groups of 16 windows of a row of `size` bytes whose load stays inside it."""
    return max(0, (size - load_bytes(symbol_bits)) // (2 * symbol_bits) + 1)


@jit()
def tail_buffer(size: int, inside: int, symbol_bits: int) -> Any:
    """Make room for the bytes behind a row's whole groups, and for as many more as windows and loads run on to there."""
    return np.empty(size - 2 * symbol_bits * inside + 2 * load_bytes(symbol_bits), np.uint8)


@jit()
def fill_tail(out: Any, row: Any, inside: int, symbol_bits: int, tail_biting: bool) -> None:
    """Copy the row's bytes from group `inside` on, then its beginning, as often as it takes, or zeros."""
    size, first = row.shape[0], 2 * symbol_bits * inside
    for i in range(out.shape[0]):
        at = first + i
        out[i] = row[at % size] if tail_biting or at < size else 0


@jit(parallel=True)
def _dense(
    bits: Any,
    per_window: Any,
    stream: Any,
    mask: Any,
    multiplier: Any,
    key: Any,
    tail_biting: Any,
    scale: Any,
    out: Any,
) -> None:
    rows, columns = out.shape
    group_weights = LANES * len(per_window)
    groups = columns // group_weights
    inside = min(groups, whole_groups(stream.shape[1], len(bits)))
    for chunk in prange(-(-rows // ROWS_AT_ONCE)):
        tail = tail_buffer(stream.shape[1], inside, len(bits))
        cut = np.empty(group_weights, out.dtype)
        for r in range(chunk * ROWS_AT_ONCE, min(rows, (chunk + 1) * ROWS_AT_ONCE)):
            for group in range(inside):
                at = group * group_weights
                _decode16(bits, per_window, stream[r], group, mask, multiplier, key, scale[r], out[r], at)
            fill_tail(tail, stream[r], inside, len(bits), tail_biting)
            for group in range(groups - inside):
                at = (inside + group) * group_weights
                _decode16(bits, per_window, tail, group, mask, multiplier, key, scale[r], out[r], at)
            if groups * group_weights < columns:
                _decode16(bits, per_window, tail, groups - inside, mask, multiplier, key, scale[r], cut, 0)
                out[r, groups * group_weights :] = cut[: columns - groups * group_weights]


@lru_cache(maxsize=64)
def constants(code: TrellisCode) -> tuple[Any, ...]:
    """Return what the compiled code takes of a code: K and V as tuples' lengths (constants there), the mask, a and c."""
    mask = np.uint32((1 << code.state_bits) - 1)
    return (0,) * code.symbol_bits, (0,) * code.weights, mask, np.uint32(code.multiplier), np.uint32(code.key)


def dense(stream: Tensor, scale: Tensor, code: TrellisCode, columns: int) -> Tensor:
    """Do as `decode_reference.dense`, bit for bit."""
    return _filled(torch.empty(stream.shape[0], columns, dtype=torch.float32), stream, scale, code)


def eight_bits(stream: Tensor, code: TrellisCode, columns: int, *, out: Tensor | None = None) -> Tensor:
    """Do as `bytes_reference.eight_bits`, bit for bit, in int8 `out` [rows, columns] if it is given."""
    steps = torch.full((stream.shape[0],), steps_of_one(code), dtype=torch.float32)
    out = torch.empty(stream.shape[0], columns, dtype=torch.int8) if out is None else out
    return _filled(out, stream, steps, code)


def _filled(out: Tensor, stream: Tensor, scale: Tensor, code: TrellisCode) -> Tensor:
    bits, per_window, mask, a, c = constants(code)
    rows = stream.contiguous().flatten(1).numpy()
    _dense(bits, per_window, rows, mask, a, c, code.tail_biting, scale.contiguous().numpy(), out.numpy())
    return out


def decode(stream: Tensor, code: TrellisCode, columns: int) -> Tensor:
    """Do as `decode_reference.decode`, bit for bit."""
    return dense(stream, torch.ones(stream.shape[0], dtype=torch.float32), code, columns).to(torch.int16)
