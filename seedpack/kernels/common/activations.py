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
from seedpack.kernels.common.vectors import (
    FLOATS,
    I8,
    I32,
    INTS,
    LANES,
    intrinsic,
    load,
    splat,
    spread,
    store,
    taken_in_turn,
)

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
def _round16(
    context: Any, weights: Any, values: Any, step: Any, codes: Any, sums: Any, offsets: Any, mask: Any, factor: Any
) -> Any:
    """Round the floats at an address, of 16 words, to multiples of a step, in place of which their remainders are left.

    The codes' words are stored, and the codes times the offsets are taken from the 16 numbers at `sums`. `weights` is a tuple
    of as many elements as a word has weights. A word of two has in its bytes the first code, both codes' sum and difference,
    and the second code.
    """
    whole = types.int64
    signature = types.void(weights, whole, types.float32, whole, whole, types.UniTuple(whole, 2), whole, whole)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, to, sums = (builder.inttoptr(args[i], I8.as_pointer()) for i in (1, 3, 4))
        mask, factor = (spread(builder, builder.trunc(arg, I32), INTS) for arg in args[6:])
        step = spread(builder, args[2], FLOATS)
        nearest = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOATS, [FLOATS]), "llvm.rint.v16f32")
        codes = []
        for i in range(weights.count):
            at = builder.gep(values, [ir.Constant(I32, 4 * LANES * i)])
            value = load(builder, at, FLOATS)
            multiple = builder.call(nearest, [builder.fdiv(value, step)])
            store(builder, builder.fsub(value, builder.fmul(multiple, step)), at)
            codes.append(builder.fptosi(multiple, INTS))
        codes = taken_in_turn(builder, codes)
        start = load(builder, sums, INTS)
        for code, offset in zip(codes, cgutils.unpack_tuple(builder, args[5]), strict=False):
            start = builder.sub(start, builder.mul(code, spread(builder, builder.trunc(offset, I32), INTS)))
        store(builder, start, sums)
        if weights.count == 1:
            word = builder.mul(builder.and_(codes[0], mask), factor)
        else:
            a, b = codes
            word = splat(INTS, 0)
            for byte, code in enumerate((a, builder.add(a, b), builder.sub(a, b), b)):
                octet = builder.and_(code, splat(INTS, 255))
                word = builder.or_(word, builder.shl(octet, splat(INTS, 8 * byte)))
        store(builder, word, to)
        return ctx.get_dummy_value()

    return signature, codegen


@jit()
def _largest(values: Any, weights: int) -> Any:
    """Return the largest magnitude, of two weights per word their largest sum, or NaN where a value is not finite."""
    bits = values.view(np.int32)
    largest = np.int32(0)
    if weights == 1:
        for i in range(len(values)):
            largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))  # magnitudes of floats are ordered as their bits
    else:
        for i in range(len(values) // 2):
            both = np.float32(abs(values[2 * i]) + abs(values[2 * i + 1]))
            largest = max(largest, both.view(np.int32) & np.int32(0x7FFFFFFF))
    return np.float32(np.nan) if largest >= 0x7F800000 else np.int32(largest).view(np.float32)


@jit()
def round_token(
    y: Any, weights: int, planes: int, codes: int, starts: int, steps: Any, offsets: Any, mask: int, factor: int
) -> None:
    """Round a token's activations in groups of 256 to codes of 8 bits, and with two planes what is left once more.

    Args:
        y: float32 [padded], zeros at its end; changed.
        weights: of a word. Codes are in ±127; of two in a word, so are their sum and difference.
        planes: 1, or 2, whose codes, sums and steps lie behind those of the first.
        codes: address of the codes' words, int32 [planes, padded / weights], see `byte_dots.pattern`.
        starts: address of int32 [planes, groups, 16], from which the sums of products start: the offsets of weights times codes.
        steps: float32 [planes·groups].
        offsets: what is taken from the sum of bytes of a word's weights.
        mask: makes the pattern, with `factor`.
    """
    padded = len(y)
    groups = -(-padded // GROUP)
    for group in range(groups):
        first, last = group * GROUP, min(padded, (group + 1) * GROUP)
        step = max(_largest(y[first:last], weights), np.float32(1e-30)) / np.float32(127 if weights == 1 else 126)
        for plane in range(planes):
            at = plane * groups + group
            steps[at] = step
            for i in range(first, last, LANES * weights):
                to, sums = codes + 4 * (plane * padded + i) // weights, starts + 4 * LANES * at
                if weights == 1:
                    _round16((0,), y.ctypes.data + 4 * i, step, to, sums, offsets, mask, factor)
                else:
                    _round16((0, 0), y.ctypes.data + 4 * i, step, to, sums, offsets, mask, factor)
            step /= np.float32(254 if weights == 1 else 126)  # what is left is at most half a step, of two at most one
