"""The trellis's search on the CPU: the reference's arithmetic in float32 lanes, rows shared among the cores.

A weight costs 2^(m + k) edges. An edge is a load, a subtraction, a multiply–add and a minimum, no index: metrics are
whole numbers, exact in float32 below 2^24, and their low k bits carry the symbol that a survivor came from through
the minimum. The 2^k edges out of a state read 2^k neighbours of the table of values, and end in neighbouring states:
they are the lanes of a vector. Numba would not find this shape, so `_relax` writes its vectors as LLVM IR, which is
compiled for whatever vector width the machine has.

The floor: 3 instructions for each 8 edges with 256-bit vectors, and 2^m lines of the table read from the L2 cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from torch import Tensor

from seedpack.kernels.common.jit import jit
from seedpack.kernels.common.vectors import LANES, intrinsic, spread
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.search_reference import CEILING, CLOSED, PADDING, Boundary, table

UNROLLED = 16
LINE = 64
CEILING_BITS = np.float32(CEILING).view(np.int32)


@intrinsic
def _relax(context: Any, bits: Any, table: Any, base: Any, metric: Any, best: Any, q: Any, x: Any) -> Any:
    """Store best[q·2^k …] = min over the 2^k predecessors p = j·2^(m-k) + q of metric[p] + (x - table[base[p] …])²."""
    k = bits.count  # a tuple's length is part of its type: a constant here
    symbols, lanes, unrolled = 1 << k, min(1 << k, LANES), min(1 << k, UNROLLED)
    signature = types.void(bits, table, base, metric, best, types.int64, types.float32)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = [cgutils.create_struct_proxy(signature.args[i])(ctx, builder, value=args[i]) for i in range(1, 5)]
        table_at, base_at, metric_at, best_at = (array.data for array in arrays)
        i64, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), lanes)

        def number(value: int) -> Any:
            return ir.Constant(i64, value)

        def vector_at(pointer: Any, index: Any) -> Any:
            return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

        states = builder.extract_value(arrays[2].shape, 0)
        stride = builder.lshr(states, number(k))
        wanted = spread(builder, args[6], vector)
        for lane in range(0, symbols, lanes):
            place = vector_at(best_at, builder.add(builder.mul(args[5], number(symbols)), number(lane)))
            with cgutils.for_range_slice(builder, number(0), number(symbols), number(unrolled), i64) as (first, _):
                least = None
                for j in range(unrolled):
                    p = builder.add(builder.mul(builder.add(first, number(j)), stride), args[5])
                    start = builder.zext(builder.load(builder.gep(base_at, [p])), i64)
                    value = builder.load(vector_at(table_at, builder.add(start, number(lane))), align=4)
                    error = builder.fsub(wanted, value)
                    square = builder.fmul(error, error, flags=("contract",))
                    so_far = spread(builder, builder.load(builder.gep(metric_at, [p])), vector)
                    cost = builder.fadd(square, so_far, flags=("contract",))
                    least = (
                        cost if least is None else builder.select(builder.fcmp_ordered("<", cost, least), cost, least)
                    )
                if unrolled < symbols:
                    before = builder.load(place, align=4)
                    least = builder.select(builder.fcmp_ordered("<", least, before), least, before)
                builder.store(least, place, align=4)
        return ctx.get_dummy_value()

    return signature, codegen


@intrinsic
def _settle(
    context: Any,
    best: Any,
    metric: Any,
    base: Any,
    history: Any,
    first: Any,
    floor: Any,
    k: Any,
    m: Any,
    tags: Any,
    memory: Any,
) -> Any:
    """Store what `_step` says of 16 states from `first` on: their symbols, and them as the next step's predecessors."""
    signature = types.void(best, metric, base, history, *(types.int64,) * 6)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = [cgutils.create_struct_proxy(signature.args[i])(ctx, builder, value=args[i]) for i in range(4)]
        f32, i32, i8 = ir.FloatType(), ir.IntType(32), ir.IntType(8)
        whole = ir.VectorType(i32, LANES)

        def at(array: Any, kind: Any) -> Any:
            return builder.bitcast(builder.gep(array.data, [args[4]]), ir.VectorType(kind, LANES).as_pointer())

        first, floor, k, m, tags, memory = (spread(builder, builder.trunc(arg, i32), whole) for arg in args[4:])
        state = builder.add(first, ir.Constant(whole, list(range(LANES))))
        cost = builder.fptosi(builder.load(at(arrays[0], f32), align=4), whole)
        tag = builder.and_(cost, tags)
        window = builder.and_(builder.or_(builder.shl(tag, m), state), memory)
        builder.store(builder.shl(window, k), at(arrays[2], i32), align=4)
        clean = builder.sub(builder.sub(cost, tag), floor)
        after = builder.and_(builder.lshr(window, builder.sub(m, k)), tags)
        builder.store(builder.sitofp(builder.add(clean, after), ir.VectorType(f32, LANES)), at(arrays[1], f32), align=4)
        builder.store(builder.trunc(tag, ir.VectorType(i8, LANES)), at(arrays[3], i8), align=1)
        return ctx.get_dummy_value()

    return signature, codegen


@jit()
def _open(metric: Any, base: Any, k: int) -> None:
    """Let every state be a start; the older bits are zero."""
    shift = metric.shape[0] >> k
    for i in range(metric.shape[0]):
        metric[i] = np.float32(i // shift)
        base[i] = i << k


@jit()
def _step(
    bits: Any,
    table: Any,
    base: Any,
    metric: Any,
    best: Any,
    bits_of_best: Any,
    history: Any,
    x: Any,
    padding: bool,
    m: int,
    tags: int,
    memory: int,
) -> None:
    """Take one weight: relax all edges, keep each state's tag, and lay out the next step's predecessors.

    `metric` holds tags too. `bits_of_best` is `best` as integers, which order positive floats alike: their minimum is
    vectorised without licence to reorder floats. `tags` and `memory` are masks.
    """
    k = len(bits)
    if padding:  # zeros behind the table: no error whatever the symbol
        base[:] = table.shape[0] - (1 << k)
        x = np.float32(0)
    if 1 << k > UNROLLED:
        best[:] = np.float32(3e38)
    for q in range(metric.shape[0] >> k):
        _relax(bits, table, base, metric, best, q, x)
    least = CEILING_BITS
    for i in range(metric.shape[0]):
        bits_of_best[i] = min(bits_of_best[i], CEILING_BITS)
        least = min(least, bits_of_best[i])
    floor = np.int64(np.array(least).view(np.float32)[()]) & ~tags
    for i in range(0, metric.shape[0], LANES):
        _settle(best, metric, base, history, i, floor, k, m, tags, memory)


@jit()
def _trace(history: Any, state: Any, k: int, symbols: Any) -> None:
    """Store the symbols on the way to a state: symbols[i] led to the state after step i."""
    states = history.shape[1]
    shift = 0
    while 1 << (shift + k) < states:
        shift += 1
    for i in range(history.shape[0] - 1, -1, -1):
        symbols[i] = state & ((1 << k) - 1)
        state = ((np.int64(history[i, state]) & ((1 << k) - 1)) << shift) | (state >> k)


@jit(parallel=True)
def _walk(
    bits: Any,
    x: Any,
    table: Any,
    state_bits: int,
    survivors: int,
    tag: int,
    start: Any,
    last: Any,
    unreal: Any,
    out: Any,
) -> None:
    """Walk over x [rows, steps]; `start` [rows] is empty for any start, `last` [rows, n] has no columns for any end."""
    rows, steps = x.shape
    k, count = len(bits), last.shape[1]
    states, tags, memory_mask = 1 << survivors, (1 << tag) - 1, (1 << (state_bits - k)) - 1
    for r in prange(rows):
        metric, best = np.empty(states, np.float32), np.empty(states, np.float32)
        base = np.empty(states, np.int32)
        as_bits = best.view(np.int32)
        history = np.empty((steps - count, states), np.uint8)
        memory: Any = 0
        _open(metric, base, k)
        if start.shape[0]:
            memory = start[r]
            first = memory & (states - 1)
            metric += np.float32(CLOSED)
            metric[first] = np.float32((memory >> (survivors - k)) & tags)
            base[first] = memory << k
        for i in range(steps - count):
            padding = x[r, i] >= unreal
            _step(bits, table, base, metric, best, as_bits, history[i], x[r, i], padding, survivors, tags, memory_mask)
        oldest: Any = 0
        state, least = 0, np.int64(1) << 62
        seen = state_bits - k * count  # bits of the first of the last symbols that other windows see too
        options = 1 << (k - seen) if count else 1
        for i in range(states):  # every survivor goes on with the last symbols
            for free in range(options):
                memory, cost = np.int64(base[i]) >> k, (np.int64(metric[i]) >> tag) << tag
                first = (np.int64(last[r, 0]) & ((1 << seen) - 1)) | (free << seen) if count else 0
                for j in range(count):
                    window = (memory << k) | (first if j == 0 else np.int64(last[r, j]))
                    memory = window & memory_mask
                    if x[r, steps - count + j] < unreal:
                        error = np.int64(x[r, steps - count + j]) - np.int64(table[window])
                        cost += error * error
                if cost < least:
                    state, oldest, least = i, first, cost
        for j in range(count):
            out[r, steps - count + j] = oldest if j == 0 else last[r, j]
        _trace(history, state, k, out[r])


@lru_cache(maxsize=8)
def _table(code: TrellisCode, tag: int) -> Any:
    """Return the table of values, float32 [2^L + 2^k], the last 2^k zero, aligned to cache lines."""
    values = table(code, tag).numpy()
    symbols = 1 << code.code_bits
    raw = np.zeros((len(values) + symbols) * 4 + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    out = raw[start : start + (len(values) + symbols) * 4].view(np.float32)
    out[: len(values)] = values
    return out


def walk(x: Tensor, code: TrellisCode, survivors: int, boundary: Boundary | None = None) -> Tensor:
    """Do as `search_reference.walk`, bit for bit."""
    tag = code.tag_bits(survivors)
    scale = 1 << -(-tag // 2)
    scaled = (x.float() * scale).contiguous().numpy()  # whole numbers still
    nothing = torch.empty(0, dtype=torch.int64)
    memory, last, _ = boundary or Boundary(nothing, nothing.expand(len(x), 0), nothing)
    start, end, unreal = memory.contiguous().numpy(), last.contiguous().numpy(), np.float32(PADDING * scale)
    out, bits = torch.empty(x.shape, dtype=torch.uint8), (0,) * code.code_bits
    _walk(bits, scaled, _table(code, tag), code.state_bits, survivors, tag, start, end, unreal, out.numpy())
    return out
