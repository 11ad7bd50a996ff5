"""The trellis's product of few tokens with 8-bit activations on the CPU: windows are multiplied as bytes, never made weights.

For 16 windows with AVX-512: a permute and a shift that cut them out of 64 bytes, a multiplication, an addition, and for each
token one instruction that multiplies the four bytes of each word with those of its activations and sums. A row's last bytes, and those
that it runs on at, are copied behind each other first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from torch import Tensor

from seedpack.kernels.common import few_tokens
from seedpack.kernels.common.activations import GROUP, STEP_WORDS, Layout
from seedpack.kernels.common.byte_dots import dot, opaque, shortfall, way, windows
from seedpack.kernels.common.few_tokens import CODE, PLANES, ROWS_AT_ONCE, Prepared, store_rows
from seedpack.kernels.common.memory import array, atomic_add, copy_line, on_stack
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
    prefetch,
    splat,
    spread,
    total,
    words_at,
)
from seedpack.kernels.rotation.cpu import plan
from seedpack.kernels.rotation.reference import LARGEST_FACTOR
from seedpack.kernels.trellis.code import TrellisCode

# The codec's own words.
STREAM, SIZE, MASK, FACTOR, KEY, TAIL_BITING = range(6)
AHEAD = 4096  # bytes that are fetched before they are needed: processors do not read ahead beyond a page of memory
_OCTETS = ir.VectorType(I8, 64)


def _reach(symbol_bits: int) -> int:
    """Return the bytes, from its first on, that a step of 64 windows may load."""
    return 64 if symbol_bits <= 6 else 128


def _accumulators(way: str, tokens: int) -> int:
    """Return how many sums a token has, so that one addition does not wait for the last, where registers of 512 bits hold them;
    elsewhere a sum takes several registers."""
    return {1: 4, 2: 2}.get(tokens, 1) if way == "vnni512" else 1


def _four_groups(builder: Any, way: str, at: Any, symbol_bits: int, state_bits: int, mask: Any) -> list[Any]:
    """Emit IR for 64 windows of the bytes at a pointer, 16 in a vector."""
    if way != "vnni512":
        starts = [builder.gep(at, [ir.Constant(I64, 2 * symbol_bits * i)]) for i in range(4)]
        return [builder.and_(words_at(builder, start, symbol_bits, 20), mask) for start in starts]
    keep = ir.Constant(_OCTETS, [255] * 63 + [0])
    loads = [(0, 2 * symbol_bits * i) for i in range(4)]
    if 8 * symbol_bits + 3 > 63:
        loads = [(byte, 0) for _, byte in loads]
    octets = {
        start: opaque(builder, builder.and_(load(builder, builder.gep(at, [ir.Constant(I64, start)]), _OCTETS), keep))
        for start in dict(loads)
    }
    return [windows(builder, octets[start], byte, symbol_bits, state_bits, mask) for start, byte in loads]


def emit_dots(
    builder: Any, name: str, symbol_bits: int, weights: int, state_bits: int, count: int, *args: Any
) -> list[Any]:
    """Emit IR for the products of a row with each of `count` tokens, not yet times its scale, in a way of `byte_dots`.

    The arguments are words: the addresses of the row's bytes, and of a copy of its last ones, less where they stand in the row;
    the last byte of the row from which a step can load; steps of 64 windows; mask, factor and key of the code; the addresses
    of codes, starts and steps, see `common.few_tokens`.
    """
    row, tail, last, chunks, mask, factor, key, codes, starts, steps = args
    sides, group_steps = _accumulators(name, count), GROUP // (STEP_WORDS * weights)
    mask, factor, key = (spread(builder, builder.trunc(word, I32), INTS) for word in (mask, factor, key))
    groups = builder.sdiv(builder.add(chunks, ir.Constant(I64, group_steps - 1)), ir.Constant(I64, group_steps))
    sums = [cgutils.alloca_once_value(builder, splat(FLOATS, 0.0)) for _ in range(count)]
    whole = [[cgutils.alloca_once(builder, INTS) for _ in range(sides)] for _ in range(count)]

    def vector_at(first: Any, index: Any) -> Any:
        place = builder.add(first, builder.mul(index, ir.Constant(I64, 64)))
        return load(builder, builder.inttoptr(place, I8.as_pointer()), INTS)

    with cgutils.for_range(builder, groups, intp=I64) as loop:
        group = loop.index
        of_tokens = [builder.add(builder.mul(groups, ir.Constant(I64, t)), group) for t in range(count)]
        for own, at in zip(whole, of_tokens, strict=True):
            builder.store(vector_at(starts, at), own[0])
            for side in own[1:]:
                builder.store(splat(INTS, 0), side)
        first = builder.mul(group, ir.Constant(I64, group_steps))
        end = builder.add(first, ir.Constant(I64, group_steps))

        def step(chunk: Any) -> None:
            byte = builder.mul(chunk, ir.Constant(I64, 8 * symbol_bits))
            start = builder.select(builder.icmp_signed("<=", byte, last), row, tail)
            at = builder.inttoptr(builder.add(start, byte), I8.as_pointer())
            ahead = builder.add(builder.add(row, byte), ir.Constant(I64, AHEAD))
            prefetch(builder, builder.inttoptr(ahead, I8.as_pointer()))
            lines = [
                builder.mul(builder.add(builder.mul(chunks, ir.Constant(I64, t)), chunk), ir.Constant(I64, 4))
                for t in range(count)
            ]
            for i, window in enumerate(_four_groups(builder, name, at, symbol_bits, state_bits, mask)):
                mixed = builder.add(builder.mul(window, factor), key)
                for own, line in zip(whole, lines, strict=True):
                    activations = vector_at(codes, builder.add(line, ir.Constant(I64, i)))
                    to = own[i % sides]
                    builder.store(dot(builder, name, weights, builder.load(to), mixed, activations), to)

        if name == "vnni512":
            with builder.if_else(builder.icmp_signed("<=", end, chunks)) as (full, rest):
                with full:
                    for i in range(group_steps):
                        step(builder.add(first, ir.Constant(I64, i)))
                with rest, cgutils.for_range_slice(builder, first, chunks, ir.Constant(I64, 1), I64) as (chunk, _):
                    step(chunk)
        else:  # registers are too few, or too short
            end = builder.select(builder.icmp_signed("<", end, chunks), end, chunks)
            with cgutils.for_range_slice(builder, first, end, ir.Constant(I64, 1), I64) as (chunk, _):
                step(chunk)
        for total_of, own, at in zip(sums, whole, of_tokens, strict=True):
            products = builder.load(own[0])
            for side in own[1:]:
                products = builder.add(products, builder.load(side))
            place = builder.add(steps, builder.mul(at, ir.Constant(I64, 4)))
            step = spread(builder, builder.load(builder.inttoptr(place, F32.as_pointer())), FLOATS)
            floats = builder.sitofp(products, FLOATS)
            builder.store(multiply_add(builder, floats, step, builder.load(total_of)), total_of)
    return [total(builder, builder.load(total_of)) for total_of in sums]


@intrinsic
def _dots(
    context: Any, bits: Any, weights: Any, wide: Any, tokens: Any, row: Any, tail: Any, last: Any, chunks: Any, mask: Any,
    factor: Any, key: Any, codes: Any, starts: Any, steps: Any,
) -> Any:  # fmt: skip
    """Return what `emit_dots` emits; tuples of K and V elements, of one where windows have more than 16 bits, and of the count
    of tokens stand for these."""
    signature = types.UniTuple(types.float32, tokens.count)(bits, weights, wide, tokens, *(types.int64,) * 10)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        form = bits.count, weights.count, 20 if wide.count else 16, tokens.count
        found = emit_dots(builder, way(), *form, *args[4:])
        return ctx.make_tuple(builder, signature.return_type, found)

    return signature, codegen


@cache
def _share(symbol_bits: int, weights: int, wide: bool, tokens: int) -> Native:
    """Return the function that multiplies rows until none is left."""
    bits, per_window, more, counted = (0,) * symbol_bits, (0,) * weights, (0,) * wide, (0,) * tokens
    reach = _reach(symbol_bits)

    of_tail, of_products = on_stack(2 * reach + 64), on_stack(4 * ROWS_AT_ONCE * tokens)

    def share(at: int) -> int:
        call = array(at, np.int64, few_tokens.WORDS)
        layer = array(call[few_tokens.LAYER], np.int64, few_tokens.KEPT_FIRST)
        code = array(layer[CODE], np.int64, 6)
        size, rows = code[SIZE], layer[few_tokens.ROWS]
        chunks = layer[few_tokens.PLANE_WORDS] // STEP_WORDS
        tail_at, last, products_at = of_tail(), size - reach, of_products()
        tail, products = array(tail_at, np.uint8, 2 * reach + 64), array(products_at, np.float32, ROWS_AT_ONCE * tokens)
        for i in range(2 * reach + 64):
            tail[i] = 0
        step, given = call[few_tokens.STEP], call[few_tokens.TOKENS] * layer[PLANES]
        while True:
            taken = atomic_add(at + 8 * few_tokens.NEXT, step)
            if taken >= rows:
                return 0
            for first in range(taken, min(rows, taken + step), ROWS_AT_ONCE):
                count = min(ROWS_AT_ONCE, min(rows, taken + step) - first)
                for r in range(count):
                    row = code[STREAM] + (first + r) * size
                    if last >= 0:
                        for line in range(0, reach, 64):
                            copy_line(tail_at + line, row + last + line)
                        if code[TAIL_BITING]:
                            copy_line(tail_at + reach, row)
                    else:
                        octets = array(row, np.uint8, size)
                        for i in range(size + 8 if code[TAIL_BITING] else size):
                            tail[i] = octets[i % size]
                    dots = _dots(
                        bits, per_window, more, counted, row, tail_at - max(0, last), last, chunks, code[MASK], code[FACTOR],
                        code[KEY], call[few_tokens.CODES], call[few_tokens.STARTS], call[few_tokens.STEPS],
                    )  # fmt: skip
                    for t in range(given):
                        products[r * tokens + t] = dots[t]
                store_rows(call, layer, first, count, products_at, tokens)

    return Native(share, f"{way()}-{symbol_bits}-{weights}-{wide}-{tokens}")


def prepare(
    stream: Tensor,
    scale: Tensor,
    factor: Tensor,
    code: TrellisCode,
    columns: int,
    bias: Tensor | None,
    planes: int,
    kept: Sequence[Tensor],
) -> Prepared | None:
    """Do as `matmul.trellis_prepare`."""
    norm, odd, small, left = plan(columns, LARGEST_FACTOR)
    if left or not stream.is_contiguous() or not (bias is None or bias.is_cpu):
        return None
    mask = (1 << code.state_bits) - 1
    words = [stream.data_ptr(), stream[0].numel(), mask, code.multiplier, code.key, code.tail_biting]
    share = partial(_share, code.symbol_bits, code.weights, code.state_bits != 16)
    offsets = [offset - shortfall(way(), code.weights) * sum(factors) for factors, offset in code.sums]
    return Prepared(
        (len(scale), columns), planes, factor * float(norm), (odd, small), scale, Layout.of_words(columns, offsets), bias, np.array(words, np.int64),
        kept, stream.detach(), share,
    )  # fmt: skip
