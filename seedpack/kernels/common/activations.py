"""Activations of few tokens on the CPU: read in their dtype, and rounded to 8 or 16 bits in groups of 256."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from seedpack.kernels.common.jit import jit
from seedpack.kernels.common.memory import array
from seedpack.kernels.common.vectors import (
    FLOATS,
    I8,
    I32,
    INTS,
    LANES,
    intrinsic,
    load,
    nearest,
    splat,
    spread,
    store,
    taken_in_turn,
)

GROUP = 256  # activations that share a scale, at most
STEP_WORDS = 64  # words that a step of the product takes
BLOCKS = 8  # blocks that lie side by side
FLOAT32, BFLOAT16 = 0, 1
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


@jit(inner=True)
def read_floats(address: int, kind: int, first: int, out: int, count: int) -> None:
    """Read numbers of a kind, from the one `first` on, as float32 at an address."""
    to = array(out, np.uint32, count)
    if kind == FLOAT32:
        words = array(address + 4 * first, np.uint32, count)
        for i in range(count):
            to[i] = words[i]
        return
    halves = array(address + 2 * first, np.uint16, count)
    for i in range(count):
        to[i] = np.uint32(halves[i]) << np.uint32(16)


@jit(inner=True)
def write_floats(values: int, address: int, kind: int, first: int, count: int) -> None:
    """Store the float32 values at an address as numbers of a kind, rounded to the nearest, ties to even."""
    words = array(values, np.uint32, count)
    if kind == FLOAT32:
        out = array(address + 4 * first, np.uint32, count)
        for i in range(count):
            out[i] = words[i]
        return
    halves = array(address + 2 * first, np.uint16, count)
    for i in range(count):
        bits = words[i]
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        not_a_number = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        halves[i] = np.uint16((bits >> np.uint32(16)) | np.uint32(0x40) if not_a_number else rounded)


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
        codes = []
        for i in range(weights.count):
            at = builder.gep(values, [ir.Constant(I32, 4 * LANES * i)])
            value = load(builder, at, FLOATS)
            multiple = nearest(builder, builder.fdiv(value, step))
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


@jit(inner=True)
def _largest(values: int, count: int, weights: int) -> Any:
    """Return the largest magnitude of the floats at an address, of two weights per word their largest sum, or NaN where a value
    is not finite."""
    bits, floats = array(values, np.int32, count), array(values, np.float32, count)
    largest = np.int32(0)
    if weights < 2:
        for i in range(count):
            largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))  # magnitudes of floats are ordered as their bits
    else:
        for i in range(count // 2):
            both = np.float32(abs(floats[2 * i]) + abs(floats[2 * i + 1]))
            largest = max(largest, both.view(np.int32) & np.int32(0x7FFFFFFF))
    return np.float32(np.nan) if largest >= 0x7F800000 else np.int32(largest).view(np.float32)


@dataclass(frozen=True)
class Layout:
    """How a plane of a layer's activations lies in memory.

    Attributes:
        padded: activations, with zeros behind the last ones.
        group: those that share a step.
        words: int32 of a plane.
        weights: activations of a word, 1 or 2; 0 where they lie in blocks, see `round_blocks`.
        offsets: of each activation of a word, what is taken from the sum of bytes that it is multiplied with.
        block: activations of a block, or 0.
        centre: what is taken from the high bytes that a block is multiplied with.
    """

    padded: int
    group: int
    words: int
    weights: int = 0
    offsets: tuple[int, ...] = (0,)
    block: int = 0
    centre: int = 0

    @staticmethod
    def of_words(columns: int, offsets: Sequence[int]) -> Layout:
        """Return the layout of words of as many activations as there are offsets, in steps of 64 words."""
        weights = len(offsets)
        words = -(-columns // (STEP_WORDS * weights)) * STEP_WORDS
        return Layout(words * weights, GROUP, words, weights, tuple(offsets))

    @staticmethod
    def of_blocks(columns: int, block: int, centre: int) -> Layout:
        """Return the layout of blocks, eight side by side, in groups of at least 96."""
        side_by_side = BLOCKS * block
        steps = -(-columns // side_by_side)
        group = side_by_side * max(1, GROUP // side_by_side)
        return Layout(steps * side_by_side, group, steps * LANES * (1 + -(-block // 4)), 0, (0,), block, centre)


@jit(inner=True)
def _round_blocks(values: int, count: int, step: Any, codes: int, block: int, centre: int) -> None:
    """Round the activations [8·blocks] of a group to multiples of a step, in place of which their remainders are left.

    For each eight blocks of C activations 64 bytes and 64 for each four activations of theirs are stored, eight of a block: first
    0 and -centre·(the sum of the block's codes), int32, from which sums begin; then four codes, int8, twice.
    """
    y, quads = array(values, np.float32, count), -(-block // 4)
    for first in range(0, count, BLOCKS * block):
        at = codes + (first // (BLOCKS * block)) * 64 * (1 + quads)
        starts, octets = array(at, np.int32, 2 * BLOCKS), array(at + 64, np.int8, 64 * quads)
        for i in range(64 * quads if block % 4 else 0):
            octets[i] = 0
        for lane in range(BLOCKS):
            starts[2 * lane] = 0
            total = 0
            for c in range(block):
                i = first + lane * block + c
                multiple = np.rint(y[i] / step)
                y[i] -= multiple * step
                total += int(multiple)
                to = 64 * (c // 4) + 8 * lane + c % 4
                octets[to] = octets[to + 4] = np.int8(multiple)
            starts[2 * lane + 1] = -centre * total


@jit(inner=True)
def round_token(
    y: int, padded: int, weights: int, planes: int, codes: int, starts: int, steps: int, offsets: Any, mask: int, factor: int,
    group: int, words: int, block: int, centre: int,
) -> None:  # fmt: skip
    """Round a token's activations in groups to codes of 8 bits, and with two planes what is left once more; see `Layout`.

    Args:
        y: address of float32 [padded], zeros at its end; changed.
        padded: activations, with those zeros.
        weights: of a word, 0 in blocks. Codes are in ±127; of two in a word, so are their sum and difference.
        planes: 1, or 2, whose codes, sums and steps lie behind those of the first.
        codes: address of the codes' words, int32 [planes, words], see `byte_dots.pattern`.
        starts: address of int32 [planes, groups, 16], from which the sums of products start: the offsets of weights times codes.
        steps: address of float32 [planes·groups].
        offsets: what is taken from the sum of bytes of a word's weights.
        mask: makes the pattern, with `factor`.
        group: activations that share a step.
        words: int32 of a plane.
        block: activations of a block, or 0.
        centre: of blocks.
    """
    groups = -(-padded // group)
    of_groups = array(steps, np.float32, planes * groups)
    for g in range(groups):
        first, last = g * group, min(padded, (g + 1) * group)
        step = max(_largest(y + 4 * first, last - first, weights), np.float32(1e-30)) / np.float32(
            126 if weights == 2 else 127
        )
        for plane in range(planes):
            at = plane * groups + g
            of_groups[at] = step
            of_sums = array(starts + 4 * LANES * at, np.int32, LANES)
            for i in range(LANES):
                of_sums[i] = 0
            to, sums = codes + 4 * (plane * words + words * first // padded), starts + 4 * LANES * at
            if weights == 0:
                _round_blocks(y + 4 * first, last - first, step, to, block, centre)
            elif weights == 1:
                for i in range(first, last, LANES):
                    _round16((0,), y + 4 * i, step, to + 4 * (i - first), sums, offsets, mask, factor)
            else:
                for i in range(first, last, 2 * LANES):
                    _round16((0, 0), y + 4 * i, step, to + 2 * (i - first), sums, offsets, mask, factor)
            step /= np.float32(126 if weights == 2 else 254)  # what is left is at most half a step, of two at most one
