"""Activations of few tokens on the CPU: read in their dtype, and rounded to 8 or 16 bits in groups of 256."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.core import cgutils

from seedpack.kernels.common.jit import jit
from seedpack.kernels.common.memory import pointer
from seedpack.kernels.common.vectors import FLOATS, I8, I32, INTS, LANES, intrinsic, load, spread, store

GROUP = 256  # activations that share a scale
FLOAT32, BFLOAT16 = 0, 1
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


@jit()
def array(address: int, kind: Any, size: int) -> Any:
    """Return the array of `size` numbers at an address."""
    return carray(pointer(address, kind), (size,))


@jit()
def read_floats(address: int, kind: int, first: int, out: Any) -> None:
    """Read numbers of a kind, from the one `first` on, as float32."""
    if kind == FLOAT32:
        out[:] = array(address + 4 * first, np.float32, len(out))
        return
    bits = array(address + 2 * first, np.uint16, len(out))
    for i in range(len(out)):
        out[i] = np.uint32(bits[i] << 16).view(np.float32)


@jit()
def write_floats(values: Any, address: int, kind: int, first: int) -> None:
    """Store float32 values as numbers of a kind, rounded to the nearest, ties to even."""
    if kind == FLOAT32:
        out = array(address + 4 * first, np.float32, len(values))
        out[:] = values
        return
    halves = array(address + 2 * first, np.uint16, len(values))
    for i in range(len(values)):
        bits = np.float32(values[i]).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        halves[i] = (bits >> 16) | 0x40 if (bits & 0x7FFFFFFF) > 0x7F800000 else rounded


@intrinsic
def _round16(context: Any, values: Any, step: Any, codes: Any, sums: Any, offset: Any, mask: Any, factor: Any) -> Any:
    """Round the 16 floats at an address to multiples of a step, in place of which their remainders are left.

    The codes' words are stored, and the codes times the offset are taken from the 16 numbers at `sums`.
    """

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, codes, sums = (builder.inttoptr(args[i], I8.as_pointer()) for i in (0, 2, 3))
        offset, mask, factor = (spread(builder, builder.trunc(arg, I32), INTS) for arg in args[4:])
        step, value = spread(builder, args[1], FLOATS), load(builder, values, FLOATS)
        nearest = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOATS, [FLOATS]), "llvm.rint.v16f32")
        whole = builder.call(nearest, [builder.fdiv(value, step)])
        code = builder.fptosi(whole, INTS)
        store(builder, builder.fsub(value, builder.fmul(whole, step)), values)
        store(builder, builder.sub(load(builder, sums, INTS), builder.mul(code, offset)), sums)
        store(builder, builder.mul(builder.and_(code, mask), factor), codes)
        return ctx.get_dummy_value()

    whole = types.int64
    return types.void(whole, types.float32, *(whole,) * 5), codegen


@jit()
def _largest(values: Any) -> Any:
    """Return the largest magnitude, or NaN where a value is not finite."""
    largest = np.int32(0)
    for bits in values.view(np.int32):
        largest = max(largest, bits & np.int32(0x7FFFFFFF))  # magnitudes of floats are ordered as their bits
    return np.float32(np.nan) if largest >= 0x7F800000 else np.int32(largest).view(np.float32)


@jit()
def round_token(
    y: Any, planes: int, padded: int, codes: int, starts: int, steps: Any, offset: int, mask: int, factor: int
) -> None:
    """Round a token's activations in groups of 256: to codes in ±127, and with two planes what is left once more.

    Args:
        y: float32 [padded], zeros at its end; changed.
        planes: 1, or 2, whose codes, sums and steps lie behind those of the first.
        padded: activations of a plane.
        codes: address of int32 [planes, padded], each code in the pattern of `byte_dots.pattern`.
        starts: address of int32 [planes, groups, 16], from which the sums of products start: the offset of weights times codes.
        steps: float32 [planes·groups].
        offset: what is taken from the sum of a weight's bytes.
        mask: makes the pattern, with `factor`.
    """
    groups = -(-padded // GROUP)
    for group in range(groups):
        first, last = group * GROUP, min(padded, (group + 1) * GROUP)
        step = max(_largest(y[first:last]), np.float32(1e-30)) / np.float32(127)
        for plane in range(planes):
            at = plane * groups + group
            steps[at] = step
            for i in range(first, last, LANES):
                to = codes + 4 * (plane * padded + i)
                _round16(y.ctypes.data + 4 * i, step, to, starts + 4 * LANES * at, offset, mask, factor)
            step /= np.float32(254)
