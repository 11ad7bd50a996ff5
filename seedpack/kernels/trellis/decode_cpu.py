"""Trellis decoding on the CPU: the reference's integers, 16 weights in a vector, a row a core.

For 16 weights of a row: a load of their bytes, a shuffle that gives each lane the four bytes its window starts in, a
shift, a mask, a multiplication and an addition, the bytes' sum (3 instructions with AVX-512, 7 without), a conversion.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from torch import Tensor

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
from seedpack.prng import trellis_multiplier


def values16(builder: Any, row: Any, group: Any, code_bits: int, mask: Any, multiplier: Any, key: Any) -> Any:
    """IR for the values of weights 16·group … 16·group + 15 of a row, as floats."""
    start = builder.gep(row, [builder.mul(group, ir.Constant(I64, 2 * code_bits))])
    words = words_at(builder, start, code_bits, 20)
    window = builder.and_(words, spread(builder, mask, INTS))
    mixed = builder.add(builder.mul(window, spread(builder, multiplier, INTS)), spread(builder, key, INTS))
    return builder.sitofp(byte_sums(builder, mixed, -510), FLOATS)


@intrinsic
def _decode16(
    context: Any, bits: Any, row: Any, group: Any, mask: Any, multiplier: Any, key: Any, scale: Any, out: Any, at: Any
) -> Any:
    """out[at … at + 15] = scale·values of a group."""
    signature = types.void(bits, row, types.int64, *(types.uint32,) * 3, types.float32, out, types.int64)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        row_at, out_at = (data(ctx, builder, signature.args[i], args[i]) for i in (1, 7))
        values = values16(builder, row_at, args[2], bits.count, *args[3:6])
        scaled = builder.fmul(values, spread(builder, args[6], FLOATS))
        store(builder, scaled, builder.gep(out_at, [args[8]]))
        return ctx.get_dummy_value()

    return signature, codegen


@njit(cache=True, nogil=True)
def load_bytes(code_bits: int) -> int:
    """Bytes that a group's load takes: `words_at`'s, for windows of up to 20 bits."""
    return 16 if code_bits <= 6 else 32


@njit(cache=True, nogil=True)
def whole_groups(size: int, code_bits: int) -> int:
    """Groups of a row of `size` bytes whose load stays inside it."""
    return max(0, (size - load_bytes(code_bits)) // (2 * code_bits) + 1)


@njit(cache=True, nogil=True)
def tail_buffer(size: int, inside: int, code_bits: int) -> Any:
    """For the bytes behind a row's whole groups, and as many more as windows and loads run on to there."""
    return np.empty(size - 2 * code_bits * inside + 2 * load_bytes(code_bits), np.uint8)


@njit(cache=True, nogil=True)
def fill_tail(out: Any, row: Any, inside: int, code_bits: int, circular: bool) -> None:
    """The row's bytes from group `inside` on, then its beginning, as often as it takes, or zeros."""
    size, first = row.shape[0], 2 * code_bits * inside
    for i in range(out.shape[0]):
        at = first + i
        out[i] = row[at % size] if circular or at < size else 0


@njit(parallel=True, cache=True, nogil=True)
def _dense(bits: Any, stream: Any, mask: Any, multiplier: Any, key: Any, circular: Any, scale: Any, out: Any) -> None:
    rows, columns = out.shape
    groups = columns // LANES
    inside = min(groups, whole_groups(stream.shape[1], len(bits)))
    for chunk in prange(-(-rows // ROWS_AT_ONCE)):
        last = tail_buffer(stream.shape[1], inside, len(bits))
        rest = np.empty(LANES, np.float32)
        for r in range(chunk * ROWS_AT_ONCE, min(rows, (chunk + 1) * ROWS_AT_ONCE)):
            for group in range(inside):
                _decode16(bits, stream[r], group, mask, multiplier, key, scale[r], out[r], group * LANES)
            fill_tail(last, stream[r], inside, len(bits), circular)
            for group in range(groups - inside):
                _decode16(bits, last, group, mask, multiplier, key, scale[r], out[r], (inside + group) * LANES)
            if groups * LANES < columns:
                _decode16(bits, last, groups - inside, mask, multiplier, key, scale[r], rest, 0)
                out[r, groups * LANES :] = rest[: columns - groups * LANES]


@lru_cache(maxsize=64)
def constants(code_bits: int, state_bits: int, key: int) -> tuple[Any, ...]:
    """What the compiled code is told of a code: k as a tuple's length (a constant there), the mask, a and c."""
    multiplier = trellis_multiplier(code_bits, state_bits)
    return (0,) * code_bits, np.uint32((1 << state_bits) - 1), np.uint32(multiplier), np.uint32(key)


def dense(
    stream: Tensor, scale: Tensor, code_bits: int, state_bits: int, key: int, circular: bool, columns: int
) -> Tensor:
    """As `reference.dense`, bit for bit."""
    out = torch.empty(stream.shape[0], columns, dtype=torch.float32)
    bits, mask, multiplier, c = constants(code_bits, state_bits, key)
    rows = stream.contiguous().flatten(1).numpy()
    _dense(bits, rows, mask, multiplier, c, circular, scale.contiguous().numpy(), out.numpy())
    return out


def decode(stream: Tensor, code_bits: int, state_bits: int, key: int, circular: bool, columns: int) -> Tensor:
    """As `reference.decode`, bit for bit."""
    return dense(stream, torch.ones(stream.shape[0]), code_bits, state_bits, key, circular, columns).to(torch.int16)
