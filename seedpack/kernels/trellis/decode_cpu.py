"""Trellis decoding on the CPU: the reference's integers, 16 weights per vector, rows shared among the cores.

For 16 weights of a row: a load of their bytes, a shuffle that gives each lane the four bytes its window starts in, a
shift, a mask, a multiplication and an addition, the bytes' sum (3 instructions with AVX-512, 7 without), a conversion.
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
    I64,
    INTS,
    LANES,
    ROWS_AT_ONCE,
    byte_sums,
    data,
    intrinsic,
    spread,
    store,
    words_at,
)
from seedpack.kernels.trellis.code import TrellisCode


def values16(builder: Any, row: Any, group: Any, code_bits: int, mask: Any, multiplier: Any, key: Any) -> Any:
    """Emit IR for the values of weights 16·group … 16·group + 15 of a row, as floats."""
    start = builder.gep(row, [builder.mul(group, ir.Constant(I64, 2 * code_bits))])
    words = words_at(builder, start, code_bits, 20)
    window = builder.and_(words, spread(builder, mask, INTS))
    mixed = builder.add(builder.mul(window, spread(builder, multiplier, INTS)), spread(builder, key, INTS))
    return builder.sitofp(byte_sums(builder, mixed, -510), FLOATS)


@intrinsic
def _decode16(
    context: Any, bits: Any, row: Any, group: Any, mask: Any, multiplier: Any, key: Any, scale: Any, out: Any, at: Any
) -> Any:
    """Store scale·values of a group in out[at … at + 15]."""
    signature = types.void(bits, row, types.int64, *(types.uint32,) * 3, types.float32, out, types.int64)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        row_at, out_at = (data(ctx, builder, signature.args[i], args[i]) for i in (1, 7))
        values = values16(builder, row_at, args[2], bits.count, *args[3:6])
        scaled = builder.fmul(values, spread(builder, args[6], FLOATS))
        store(builder, scaled, builder.gep(out_at, [args[8]]))
        return ctx.get_dummy_value()

    return signature, codegen


@jit()
def load_bytes(code_bits: int) -> int:
    """Return the bytes that a group's load takes: `words_at`'s, for windows of up to 20 bits."""
    return 16 if code_bits <= 6 else 32


@jit()
def whole_groups(size: int, code_bits: int) -> int:
    """Count the groups of a row of `size` bytes whose load stays inside it."""
    return max(0, (size - load_bytes(code_bits)) // (2 * code_bits) + 1)


@jit()
def tail_buffer(size: int, inside: int, code_bits: int) -> Any:
    """Make room for the bytes behind a row's whole groups, and for as many more as windows and loads run on to there."""
    return np.empty(size - 2 * code_bits * inside + 2 * load_bytes(code_bits), np.uint8)


@jit()
def fill_tail(out: Any, row: Any, inside: int, code_bits: int, tail_biting: bool) -> None:
    """Copy the row's bytes from group `inside` on, then its beginning, as often as it takes, or zeros."""
    size, first = row.shape[0], 2 * code_bits * inside
    for i in range(out.shape[0]):
        at = first + i
        out[i] = row[at % size] if tail_biting or at < size else 0


@jit(parallel=True)
def _dense(
    bits: Any, stream: Any, mask: Any, multiplier: Any, key: Any, tail_biting: Any, scale: Any, out: Any
) -> None:
    rows, columns = out.shape
    groups = columns // LANES
    inside = min(groups, whole_groups(stream.shape[1], len(bits)))
    for chunk in prange(-(-rows // ROWS_AT_ONCE)):
        tail = tail_buffer(stream.shape[1], inside, len(bits))
        cut = np.empty(LANES, np.float32)
        for r in range(chunk * ROWS_AT_ONCE, min(rows, (chunk + 1) * ROWS_AT_ONCE)):
            for group in range(inside):
                _decode16(bits, stream[r], group, mask, multiplier, key, scale[r], out[r], group * LANES)
            fill_tail(tail, stream[r], inside, len(bits), tail_biting)
            for group in range(groups - inside):
                _decode16(bits, tail, group, mask, multiplier, key, scale[r], out[r], (inside + group) * LANES)
            if groups * LANES < columns:
                _decode16(bits, tail, groups - inside, mask, multiplier, key, scale[r], cut, 0)
                out[r, groups * LANES :] = cut[: columns - groups * LANES]


@lru_cache(maxsize=64)
def constants(code: TrellisCode) -> tuple[Any, ...]:
    """Return what the compiled code takes of a code: k as a tuple's length (a constant there), the mask, a and c."""
    mask = np.uint32((1 << code.state_bits) - 1)
    return (0,) * code.code_bits, mask, np.uint32(code.multiplier), np.uint32(code.key)


def dense(stream: Tensor, scale: Tensor, code: TrellisCode, columns: int) -> Tensor:
    """Do as `decode_reference.dense`, bit for bit."""
    out = torch.empty(stream.shape[0], columns, dtype=torch.float32)
    bits, mask, multiplier, key = constants(code)
    rows = stream.contiguous().flatten(1).numpy()
    _dense(bits, rows, mask, multiplier, key, code.tail_biting, scale.contiguous().numpy(), out.numpy())
    return out


def decode(stream: Tensor, code: TrellisCode, columns: int) -> Tensor:
    """Do as `decode_reference.decode`, bit for bit."""
    return dense(stream, torch.ones(stream.shape[0], dtype=torch.float32), code, columns).to(torch.int16)
