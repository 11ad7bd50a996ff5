"""The trellis's search on the CPU: the reference's arithmetic in float32 lanes, rows shared among the cores.

A window costs 2^(m + K) edges. An edge is a minimum, and for each weight a load, a subtraction and a multiply–add, no index:
metrics are whole numbers, exact in float32 below 2^24, and their low K bits carry the symbol that a survivor came from
through the minimum. The 2^K edges out of a state read 2^K neighbours of the tables of values, and end in neighbouring
states: they are the lanes of a vector. Numba would not find this shape, so `_relax` writes its vectors as LLVM IR, which is
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
from seedpack.kernels.common.vectors import LANES, intrinsic, multiply_add, splat, spread, target_has
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.search_reference import CEILING, CLOSED, PADDING, Boundary, table

FAR = 3e38
LINE = 64
MINIMA = {True: 8, False: 4}  # vectors of 16 that a tile keeps in registers, of 512 bits or shorter
CEILING_BITS = np.float32(CEILING).view(np.int32)


@intrinsic
def _relax(
    context: Any, bits: Any, per_window: Any, tile: Any, wanted: Any, planes: Any, table: Any, base: Any, metric: Any, best: Any,
    first: Any,
) -> Any:  # fmt: skip
    """Store best[q·2^K …] = min over the 2^K predecessors p = j·2^(m-K) + q of metric[p] + Σ_v (wanted[v] - values_v)², for
    a tile of q from `first` on, whose minima stay in registers and whose values mostly lie side by side.

    The values of the edges out of p are table[planes[v], base[p] …].
    """
    k = bits.count  # a tuple's length is part of its type: a constant here
    symbols, lanes = 1 << k, min(1 << k, LANES)
    signature = types.void(bits, per_window, tile, wanted, planes, table, base, metric, best, types.int64)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = [cgutils.create_struct_proxy(signature.args[i])(ctx, builder, value=args[i]) for i in range(3, 9)]
        wanted_at, planes_at, table_at, base_at, metric_at, best_at = (array.data for array in arrays)
        size = builder.extract_value(arrays[2].shape, 1)
        i64, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), lanes)

        def number(value: int) -> Any:
            return ir.Constant(i64, value)

        def vector_at(pointer: Any, index: Any) -> Any:
            return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

        stride = builder.lshr(builder.extract_value(arrays[4].shape, 0), number(k))
        weights = []
        for v in range(per_window.count):
            plane = builder.load(builder.gep(planes_at, [number(v)]))
            value = builder.load(builder.gep(wanted_at, [number(v)]))
            weights.append((spread(builder, value, vector), builder.gep(table_at, [builder.mul(plane, size)])))
        groups = range(0, symbols, lanes)
        least = [[cgutils.alloca_once_value(builder, splat(vector, FAR)) for _ in groups] for _ in range(tile.count)]
        with cgutils.for_range(builder, number(symbols), intp=i64) as loop:
            first = builder.add(builder.mul(loop.index, stride), args[9])
            for i, of_state in enumerate(least):
                p = builder.add(first, number(i))
                start = builder.zext(builder.load(builder.gep(base_at, [p])), i64)
                so_far = spread(builder, builder.load(builder.gep(metric_at, [p])), vector)
                for lane, own in zip(groups, of_state, strict=True):
                    cost, at = so_far, builder.add(start, number(lane))
                    for value, values in weights:
                        error = builder.fsub(value, builder.load(vector_at(values, at), align=4))
                        cost = multiply_add(builder, error, error, cost)
                    before = builder.load(own)
                    builder.store(builder.select(builder.fcmp_ordered("<", cost, before), cost, before), own)
        for i, of_state in enumerate(least):
            start = builder.mul(builder.add(args[9], number(i)), number(symbols))
            for lane, own in zip(groups, of_state, strict=True):
                builder.store(builder.load(own), vector_at(best_at, builder.add(start, number(lane))), align=4)
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
    per_window: Any,
    tile: Any,
    table: Any,
    base: Any,
    metric: Any,
    best: Any,
    bits_of_best: Any,
    history: Any,
    x: Any,
    unreal: Any,
    m: int,
    tags: int,
    memory: int,
) -> None:
    """Take one window: relax all edges, keep each state's tag, and lay out the next step's predecessors.

    `metric` holds tags too. `bits_of_best` is `best` as integers, which order positive floats alike: their minimum is
    vectorised without licence to reorder floats. `tags` and `memory` are masks.
    """
    k = len(bits)
    wanted, planes = np.empty(len(per_window), np.float32), np.empty(len(per_window), np.int64)
    for v in range(len(per_window)):
        padding = x[v] >= unreal  # the last plane is zeros: no error whatever the symbol
        wanted[v], planes[v] = np.float32(0) if padding else x[v], len(per_window) if padding else v
    for first in range(0, metric.shape[0] >> k, len(tile)):
        _relax(bits, per_window, tile, wanted, planes, table, base, metric, best, first)
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
    per_window: Any,
    tile: Any,
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
    """Walk over x [rows, steps, V]; `start` [rows] is empty for any start, `last` [rows, n] has no columns for any end."""
    rows, steps, _ = x.shape
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
            _step(
                bits, per_window, tile, table, base, metric, best, as_bits, history[i], x[r, i], unreal, survivors, tags,
                memory_mask,
            )  # fmt: skip
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
                    for v in range(len(per_window)):
                        if x[r, steps - count + j, v] < unreal:
                            error = np.int64(x[r, steps - count + j, v]) - np.int64(table[v, window])
                            cost += error * error
                if cost < least:
                    state, oldest, least = i, first, cost
        for j in range(count):
            out[r, steps - count + j] = oldest if j == 0 else last[r, j]
        _trace(history, state, k, out[r])


@lru_cache(maxsize=8)
def _table(code: TrellisCode, tag: int) -> Any:
    """Return the tables of values, float32 [V + 1, 2^L], the last one zero, aligned to cache lines."""
    values = table(code, tag).numpy()
    shape = len(values) + 1, max(values.shape[1], LINE // 4)
    raw = np.zeros(shape[0] * shape[1] * 4 + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    out = raw[start : start + shape[0] * shape[1] * 4].view(np.float32).reshape(shape)
    out[:-1, : values.shape[1]] = values
    return out


def walk(x: Tensor, code: TrellisCode, survivors: int, boundary: Boundary | None = None) -> Tensor:
    """Do as `search_reference.walk`, bit for bit."""
    tag = code.tag_bits(survivors)
    scale = 1 << -(-tag // 2)
    scaled = (x.float() * scale).contiguous().numpy()  # whole numbers still
    nothing = torch.empty(0, dtype=torch.int64)
    memory, last, _ = boundary or Boundary(nothing, nothing.expand(len(x), 0), nothing)
    start, end, unreal = memory.contiguous().numpy(), last.contiguous().numpy(), np.float32(PADDING * scale)
    out, bits = torch.empty(x.shape[:2], dtype=torch.uint8), (0,) * code.symbol_bits
    minima = MINIMA[target_has("avx512f")] // max(1, (1 << code.symbol_bits) // LANES)
    tile = (0,) * min(max(1, minima), 1 << survivors - code.symbol_bits)
    _walk(
        bits, (0,) * code.weights, tile, scaled, _table(code, tag), code.state_bits, survivors, tag, start, end, unreal,
        out.numpy(),
    )  # fmt: skip
    return out
