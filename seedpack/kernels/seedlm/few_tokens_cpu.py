"""SeedLM's product of few tokens with rounded activations on the CPU: states are multiplied as bytes, never made weights.

A block's product is Σ_p q[p]·Σ_c V[c, p]·x[c], times 2^e. Eight blocks lie in the lanes of 64 bits of a vector, each with its
register's whole sequence, of which byte shifts cut four states at a time: their low bytes, and their high ones. One instruction
multiplies either with four activations and sums them, so that a state costs a quarter of two instructions, no multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from torch import Tensor

from seedpack.kernels.common import few_tokens
from seedpack.kernels.common.activations import BLOCKS, Layout
from seedpack.kernels.common.byte_dots import byte_shift, dot, way
from seedpack.kernels.common.few_tokens import CODE, PLANES, ROWS_AT_ONCE, Prepared, store_rows
from seedpack.kernels.common.jit import jit
from seedpack.kernels.common.memory import array, atomic_add, on_stack
from seedpack.kernels.common.native import Native
from seedpack.kernels.common.vectors import (
    F32,
    FLOATS,
    I8,
    I32,
    I64,
    INTS,
    intrinsic,
    load,
    multiply_add,
    splat,
    spread,
    total,
)
from seedpack.kernels.seedlm.code import CODE_BITS, SeedLMCode, SeedLMParts
from seedpack.prng import LFSR_TAPS

# The codec's own words.
SEEDS, SEED_BYTES, CODES, CODE_BYTES, EXPONENT, LAST_SEEDS, LAST_CODES, ENDS = range(8)
MARGIN = 64  # bytes behind a row that a load may take
LANES64, OCTETS = ir.VectorType(I64, BLOCKS), ir.VectorType(I8, 64)
HALVES = ir.Constant(FLOATS, [1.0, 256.0] * BLOCKS)  # of low and of high bytes


def _fields(builder: Any, address: Any, stride: int, bits: int) -> Any:
    """Emit IR for eight fields of some bits of the bytes at an address, lane i from bit stride·i on, with zeros above."""
    taken = max(-(-(stride * lane % 8 + bits) // 8) for lane in range(BLOCKS))
    starts = [stride * lane // 8 for lane in range(BLOCKS)]
    width = next(size for size in (16, 32, 64) if size >= starts[-1] + taken)
    octets = load(builder, builder.inttoptr(address, I8.as_pointer()), ir.VectorType(I8, width))
    places = [start + i if i < taken else width for start in starts for i in range(8)]
    moved = builder.shuffle_vector(
        octets, splat(octets.type, 0), ir.Constant(ir.VectorType(I32, 64), [min(place, width) for place in places])
    )
    lanes = builder.bitcast(moved, LANES64)
    if stride % 8:
        lanes = builder.lshr(lanes, ir.Constant(LANES64, [stride * lane % 8 for lane in range(BLOCKS)]))
    return lanes if stride % 8 == bits % 8 == 0 else builder.and_(lanes, splat(LANES64, (1 << bits) - 1))


def _sequence(builder: Any, seeds: Any, seed_bits: int, length: int) -> Any:
    """Emit IR for the bits that a register of K bits gives, at most 64, from the seed's own on.

    b[n + K] = XOR_j b[n + j]. Only the largest tap reaches bits that are new themselves, K - j before: what it adds is a sum of
    every such bit before, made by doubling. So as many bits come at once as lie above the second largest tap.
    """
    *others, largest = LFSR_TAPS[seed_bits]
    known, sequence = seed_bits, seeds
    while known < length:
        count = min(seed_bits - max(others), length - known)
        new = builder.lshr(sequence, splat(LANES64, known - seed_bits + largest))
        for tap in others:
            new = builder.xor(new, builder.lshr(sequence, splat(LANES64, known - seed_bits + tap)))
        reach = seed_bits - largest
        while reach < count:
            new = builder.xor(new, builder.shl(new, splat(LANES64, reach)))
            reach *= 2
        if known + count < 64:
            new = builder.and_(new, splat(LANES64, (1 << count) - 1))
        sequence = builder.or_(sequence, builder.shl(new, splat(LANES64, known)))
        known += count
    return sequence


def _states(builder: Any, sequence: Any, code: SeedLMCode, p: int) -> list[Any]:
    """Emit IR for the states V[c, p] of eight blocks, four values of c at a time: their low bytes, then their high ones."""
    found = []
    for first in range(0, code.block, 4):
        bits = [min(first + i, code.block - 1) * code.rank + p + 1 for i in range(4)]
        octets = byte_shift(builder, builder.bitcast(sequence, OCTETS), [*bits, *(bit + 8 for bit in bits)])
        if code.seed_bits < 16:
            keep = ir.Constant(OCTETS, ([255] * 4 + [(1 << (code.seed_bits - 8)) - 1] * 4) * BLOCKS)
            octets = builder.and_(octets, keep)
        found.append(builder.bitcast(octets, INTS))
    return found


def emit_dots(builder: Any, code: SeedLMCode, count: int, *args: Any) -> list[Any]:
    """Emit IR for the products of a row with each of `count` tokens, not yet times the unit.

    The arguments are words: the addresses of the row's seeds and codes; steps of eight blocks, and those of a group; the bias
    of exponents, with that of float32; the addresses of activations, see `activations.Layout`, and of steps.
    """
    seeds, codes, batches, group_batches, bias, activations, steps = args
    quads, stride = -(-code.block // 4), CODE_BITS * (code.rank + 1)
    size = ir.Constant(I64, 64 * (1 + quads))
    bias = spread(builder, builder.trunc(bias, I32), INTS)
    groups = builder.sdiv(builder.add(batches, builder.sub(group_batches, ir.Constant(I64, 1))), group_batches)
    sums = [cgutils.alloca_once_value(builder, splat(FLOATS, 0.0)) for _ in range(count)]
    of_group = [cgutils.alloca_once(builder, FLOATS) for _ in range(count)]
    with cgutils.for_range(builder, groups, intp=I64) as loop:
        for own in of_group:
            builder.store(splat(FLOATS, 0.0), own)
        first = builder.mul(loop.index, group_batches)
        end = builder.add(first, group_batches)
        end = builder.select(builder.icmp_signed("<", end, batches), end, batches)
        with cgutils.for_range_slice(builder, first, end, ir.Constant(I64, 1), I64) as (batch, _):
            at = builder.add(seeds, builder.mul(batch, ir.Constant(I64, code.seed_bits)))
            sequence = _sequence(
                builder,
                _fields(builder, at, code.seed_bits, code.seed_bits),
                code.seed_bits,
                code.seed_bits + code.states,
            )
            at = builder.add(codes, builder.mul(batch, ir.Constant(I64, stride)))
            fields = builder.bitcast(_fields(builder, at, stride, stride), OCTETS)
            # a byte whose upper half is the field: 28 bits lower it stands in a lane of 32 bits with its sign
            numbers = [
                builder.ashr(
                    builder.bitcast(byte_shift(builder, fields, [(CODE_BITS * (i - 1)) % 64] * 8), INTS),
                    splat(INTS, 28),
                )
                for i in range(code.rank + 1)
            ]
            power = builder.bitcast(builder.shl(builder.add(numbers[0], bias), splat(INTS, 23)), FLOATS)
            states = [_states(builder, sequence, code, p) for p in range(code.rank)]
            for t in range(count):
                row = builder.mul(builder.add(builder.mul(batches, ir.Constant(I64, t)), batch), size)
                place = builder.inttoptr(builder.add(activations, row), I8.as_pointer())
                start, *x = (
                    load(builder, builder.gep(place, [ir.Constant(I64, 64 * i)]), INTS) for i in range(1 + quads)
                )
                product = splat(INTS, 0)
                for mantissa, of_rank in zip(numbers[1:], states, strict=True):
                    state_sum = start
                    for octets, given in zip(of_rank, x, strict=True):
                        state_sum = dot(builder, "vnni512", 1, state_sum, octets, given)
                    product = builder.add(product, builder.mul(state_sum, mantissa))
                value = builder.fmul(builder.sitofp(product, FLOATS), HALVES)
                builder.store(multiply_add(builder, value, power, builder.load(of_group[t])), of_group[t])
        for t, (own, of_row) in enumerate(zip(of_group, sums, strict=True)):
            index = builder.add(builder.mul(groups, ir.Constant(I64, t)), loop.index)
            place = builder.inttoptr(builder.add(steps, builder.mul(index, ir.Constant(I64, 4))), F32.as_pointer())
            step = spread(builder, builder.load(place), FLOATS)
            builder.store(multiply_add(builder, builder.load(own), step, builder.load(of_row)), of_row)
    return [total(builder, builder.load(of_row)) for of_row in sums]


@intrinsic
def _dots(
    context: Any, bits: Any, block: Any, rank: Any, tokens: Any, seeds: Any, codes: Any, batches: Any, group_batches: Any,
    bias: Any, activations: Any, steps: Any,
) -> Any:  # fmt: skip
    """Return what `emit_dots` emits; tuples of K, C and P elements and of the count of tokens stand for these."""
    signature = types.UniTuple(types.float32, tokens.count)(bits, block, rank, tokens, *(types.int64,) * 7)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = emit_dots(builder, SeedLMCode(bits.count, block.count, rank.count), tokens.count, *args[4:])
        return ctx.make_tuple(builder, signature.return_type, found)

    return signature, codegen


@jit(inner=True)
def _copied(source: int, to: int, count: int) -> int:
    """Copy bytes from one address to another, which is returned."""
    octets, copy = array(source, np.uint8, count), array(to, np.uint8, count)
    for i in range(count):
        copy[i] = octets[i]
    return to


@cache
def _share(code: SeedLMCode, tokens: int) -> Native:
    """Return the function that multiplies rows until none is left."""
    bits, block, rank, counted = (0,) * code.seed_bits, (0,) * code.block, (0,) * code.rank, (0,) * tokens
    side_by_side = BLOCKS * code.block

    of_products = on_stack(4 * ROWS_AT_ONCE * tokens)

    def share(at: int) -> int:
        call = array(at, np.int64, few_tokens.WORDS)
        layer = array(call[few_tokens.LAYER], np.int64, few_tokens.KEPT_FIRST)
        own = array(layer[CODE], np.int64, 8)
        rows, seed_bytes, code_bytes = layer[few_tokens.ROWS], own[SEED_BYTES], own[CODE_BYTES]
        batches, group_batches = layer[few_tokens.PADDED] // side_by_side, layer[few_tokens.GROUP] // side_by_side
        step, given = call[few_tokens.STEP], call[few_tokens.TOKENS] * layer[PLANES]
        products_at = of_products()
        products = array(products_at, np.float32, ROWS_AT_ONCE * tokens)
        while True:
            taken = atomic_add(at + 8 * few_tokens.NEXT, step)
            if taken >= rows:
                return 0
            for first in range(taken, min(rows, taken + step), ROWS_AT_ONCE):
                count = min(ROWS_AT_ONCE, min(rows, taken + step) - first)
                for r in range(count):
                    seeds, codes = own[SEEDS] + (first + r) * seed_bytes, own[CODES] + (first + r) * code_bytes
                    left = rows - 1 - (first + r)
                    if left < own[ENDS]:  # loads may go beyond the last row: there a copy is read, each row's its own
                        seeds = _copied(seeds, own[LAST_SEEDS] + left * (seed_bytes + MARGIN), seed_bytes)
                        codes = _copied(codes, own[LAST_CODES] + left * (code_bytes + MARGIN), code_bytes)
                    dots = _dots(
                        bits, block, rank, counted, seeds, codes, batches, group_batches, own[EXPONENT],
                        call[few_tokens.CODES], call[few_tokens.STEPS],
                    )  # fmt: skip
                    for t in range(given):
                        products[r * tokens + t] = dots[t]
                store_rows(call, layer, first, count, products_at, tokens)

    return Native(share, f"{way()}-{code.seed_bits}-{code.block}-{code.rank}-{tokens}")


def prepare(
    parts: SeedLMParts, code: SeedLMCode, columns: int, bias: Tensor | None, planes: int, kept: Sequence[Tensor]
) -> Prepared | None:
    """Do as `matmul.seedlm_prepare`."""
    fits = 8 < code.seed_bits <= 16 and code.seed_bits + code.states <= 64 and CODE_BITS * (code.rank + 1) <= 60
    seeds, codes = parts[:2]
    if way() != "vnni512" or not fits or not (seeds.is_contiguous() and codes.is_contiguous()):
        return None
    if not (bias is None or bias.is_cpu):
        return None
    rows = len(seeds)
    ends = min(rows, 1 + MARGIN // min(seeds[0].numel(), codes[0].numel()))  # rows less than a load from the end
    last = [torch.zeros(ends, part[0].numel() + MARGIN, dtype=torch.uint8) for part in (seeds, codes)]
    words = [seeds.data_ptr(), seeds[0].numel(), codes.data_ptr(), codes[0].numel(), int(parts.exponent_bias) + 127]
    words += [*map(Tensor.data_ptr, last), ends]
    layout = Layout.of_blocks(columns, code.block, 1 << (code.seed_bits - 9))
    scale = torch.full((rows,), code.unit, dtype=torch.float32)
    return Prepared(
        (rows, columns), planes, None, (1, np.ones((1, 1), np.float32)), scale, layout, bias, np.array(words, np.int64), kept,
        (seeds.detach(), codes.detach(), *last), partial(_share, code),
    )  # fmt: skip
