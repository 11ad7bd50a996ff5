"""The trellis's search on the CPU: the reference's whole numbers in lanes of 32 bits, rows shared among the cores.

A window costs 2^(m + K) edges. An edge makes its window's word with one addition, as the words of the 2^K edges out of a state
are multiples of the code's multiplier apart; then comes for each weight a dot product of the word's bytes and a product that
adds the squared error, and a minimum. No table is read and no index kept: a tag in the low bits of a metric carries the symbol
that a survivor came from through the minimum. A negative error's square comes out one too large, which spare bits below the tag
take: the tags of a state's edges differ, so they decide nothing. Edges out of a state end in neighbouring states, which are the
lanes of a vector; of fewer than 16 edges several states' are side by side. Numba would not find this shape, so `_relax` writes
its vectors as LLVM IR, with the products of bytes that the machine has (`common.byte_dots`).

The floor with VNNI: 2 + 2·V instructions for 16 edges.
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

from seedpack.kernels.common.byte_dots import add_square, dot, pattern, shortfall, way
from seedpack.kernels.common.jit import jit
from seedpack.kernels.common.vectors import I8, I32, I64, INTS, LANES, data, intrinsic, splat, spread, target_has
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.search_reference import CEILING, CLOSED, PADDING, Boundary, table
from seedpack.prng import MASK32

FAR = (1 << 31) - 1
MINIMA = {True: 8, False: 4}  # vectors of 16 that a tile keeps in registers, of 512 bits or shorter


def _vector_at(builder: Any, pointer: Any, index: Any, kind: Any = I32) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), ir.VectorType(kind, LANES).as_pointer())


def _lesser(builder: Any, left: Any, right: Any) -> Any:
    return builder.select(builder.icmp_signed("<", left, right), left, right)


@intrinsic
def _relax(
    context: Any, bits: Any, per_window: Any, tile: Any, spare: Any, starts: Any, factors: Any, steps: Any, word: Any, metric: Any,
    next_word: Any, next_metric: Any, history: Any, least: Any, numbers: Any, first: Any,
) -> Any:  # fmt: skip
    """Take the least of metric[p] + Σ_v error_v² over the 2^K predecessors p = j·2^(m-K) + q of each state q·2^K + symbol, for
    as many q from `first` on as the vectors of a tile hold, and store the states as the next step's predecessors.

    The words of the edges out of p are word[p] + steps[symbol]; error_v is starts[v] + the word's bytes times factors[v].
    least[16] is kept below all minima. `numbers` are those of `_numbers`.
    """
    k = bits.count  # a tuple's length is part of its type: a constant here
    symbols, weights, below, how = 1 << k, per_window.count, spare.count, way()
    together = max(1, LANES // symbols)  # predecessors in one vector
    arrays = (starts, factors, steps, word, metric, next_word, next_metric, history, least, numbers)
    signature = types.void(bits, per_window, tile, spare, *arrays, types.int64)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        (starts_at, factors_at, steps_at, word_at, metric_at, next_word_at, next_metric_at, history_at, least_at,
         numbers_at) = (data(ctx, builder, signature.args[i], args[i]) for i in range(4, 14))  # fmt: skip
        states = builder.extract_value(
            cgutils.create_struct_proxy(signature.args[8])(ctx, builder, value=args[8]).shape, 0
        )

        def number(value: int) -> Any:
            return ir.Constant(I64, value)

        def scalar(pointer: Any, index: int) -> Any:
            return builder.load(builder.gep(pointer, [number(index)]))

        def of_predecessors(pointer: Any, index: Any) -> Any:
            """Emit IR for the numbers of the predecessors of a vector, each in the lanes of its edges."""
            own = ir.VectorType(I32, together)
            loaded = builder.load(builder.bitcast(builder.gep(pointer, [index]), own.as_pointer()), align=4)
            lanes = ir.Constant(INTS, [lane // symbols if together > 1 else 0 for lane in range(LANES)])
            return builder.shuffle_vector(loaded, ir.Constant(own, ir.Undefined), lanes)

        errors = [tuple(spread(builder, scalar(at, v), INTS) for at in (starts_at, factors_at)) for v in range(weights)]
        groups = range(0, symbols, LANES) if together == 1 else range(1)
        step = [builder.load(_vector_at(builder, steps_at, number(group)), align=4) for group in groups]
        minima = [[cgutils.alloca_once_value(builder, splat(INTS, FAR)) for _ in groups] for _ in range(tile.count)]
        stride = builder.lshr(states, number(k))
        with cgutils.for_range(builder, number(symbols), intp=I64) as loop:
            begin = builder.add(builder.mul(loop.index, stride), args[14])
            for i, of_state in enumerate(minima):
                p = builder.add(begin, number(i * together))
                words_of, so_far = of_predecessors(word_at, p), of_predecessors(metric_at, p)
                for own, distance in zip(of_state, step, strict=True):
                    words, cost = builder.add(words_of, distance), so_far
                    for start, factor in errors:
                        error = dot(builder, how, weights, start, words, factor)
                        cost = add_square(builder, how, cost, error, exact=not below)
                    builder.store(_lesser(builder, cost, builder.load(own)), own)
        floor, ceiling, tags, top, of_memory, up, down, metrics = (
            spread(builder, scalar(numbers_at, i), INTS) for i in range(8)
        )
        lanes, apart = ir.Constant(INTS, [lane << below for lane in range(LANES)]), ir.Constant(I32, 1 << below)
        whole = _vector_at(builder, least_at, number(0))
        least = builder.load(whole, align=4)
        for i, of_state in enumerate(minima):
            start = builder.mul(builder.add(args[14], number(i * together)), number(symbols))
            for group, own in zip(groups, of_state, strict=True):
                at = builder.add(start, number(group))
                best = _lesser(builder, builder.load(own), ceiling)
                least = _lesser(builder, best, least)
                state = builder.add(spread(builder, builder.mul(builder.trunc(at, I32), apart), INTS), lanes)
                memory = builder.add(state, builder.shl(builder.and_(best, top), up))
                tag = builder.and_(builder.lshr(memory, down), tags)
                cost = builder.sub(builder.or_(builder.and_(best, metrics), tag), floor)
                builder.store(builder.mul(memory, of_memory), _vector_at(builder, next_word_at, at), align=4)
                builder.store(cost, _vector_at(builder, next_metric_at, at), align=4)
                octets = builder.trunc(best, ir.VectorType(I8, LANES))
                builder.store(octets, _vector_at(builder, history_at, at, I8), align=1)
        builder.store(least, whole, align=4)
        return ctx.get_dummy_value()

    return signature, codegen


@jit()
def _open(metric: Any, word: Any, k: int, spare: int, multiplier: int) -> None:
    """Let every state be a start; the older bits are zero."""
    shift = metric.shape[0] >> k
    for i in range(metric.shape[0]):
        metric[i] = (i // shift) << spare
        word[i] = np.int32((i << k) * multiplier)


@jit()
def _numbers(state_bits: int, k: int, m: int, tag: int, spare: int, unit: int, multiplier: int) -> Any:
    """Return what `_relax` lays states out with: the floor to take from metrics, the ceiling above it, the masks of tags and of
    their bits that stay in a window, what a memory (a multiple of 2^spare) is multiplied with for its word, m, m - K, and the
    mask of metrics."""
    out = np.empty(8, np.int32)
    out[0], out[1] = 0, CEILING * unit  # units of the reference's metrics
    out[2], out[3] = ((1 << tag) - 1) << spare, ((1 << (state_bits - k - m)) - 1) << spare
    out[4], out[5], out[6], out[7] = np.int32(multiplier << (k - spare)), m, m - k, -1 << (tag + spare)
    return out


@jit()
def _step(
    bits: Any, per_window: Any, tile: Any, spare: Any, code: Any, steps: Any, starts: Any, factors: Any, word: Any, metric: Any,
    next_word: Any, next_metric: Any, history: Any, least: Any, numbers: Any, x: Any, unreal: Any,
) -> None:  # fmt: skip
    """Take one window: relax all edges, and lay out the next step's predecessors.

    Metrics hold tags too. What the reference takes from them in a step is taken in the next one, when it is known. `code`
    [2, V] is what errors start from and what bytes are multiplied with.
    """
    for v in range(len(per_window)):
        padding = x[v] >= unreal  # no error whatever the symbol
        starts[v], factors[v] = 0 if padding else code[0, v] - x[v], 0 if padding else code[1, v]
    least[:] = numbers[1]
    for first in range(0, metric.shape[0] >> len(bits), len(tile) * max(1, LANES >> len(bits))):
        _relax(
            bits,
            per_window,
            tile,
            spare,
            starts,
            factors,
            steps,
            word,
            metric,
            next_word,
            next_metric,
            history,
            least,
            numbers,
            first,
        )
    floor = (least.min() - numbers[0]) & numbers[7]
    numbers[1] += floor - numbers[0]
    numbers[0] = floor


@jit()
def _trace(history: Any, state: Any, k: int, spare: int, symbols: Any) -> None:
    """Store the symbols on the way to a state: symbols[i] led to the state after step i."""
    states = history.shape[1]
    shift = 0
    while 1 << (shift + k) < states:
        shift += 1
    for i in range(history.shape[0] - 1, -1, -1):
        symbols[i] = state & ((1 << k) - 1)
        state = (((np.int64(history[i, state]) >> spare) & ((1 << k) - 1)) << shift) | (state >> k)


@jit(parallel=True)
def _walk(
    bits: Any, per_window: Any, tile: Any, spare: Any, x: Any, code: Any, steps: Any, table: Any, state_bits: int, survivors: int,
    tag: int, unit: int, multiplier: int, inverse: int, start: Any, last: Any, unreal: Any, out: Any,
) -> None:  # fmt: skip
    """Walk over x [rows, steps, V]; `start` [rows] is empty for any start, `last` [rows, n] has no columns for any end."""
    rows, length, _ = x.shape
    k, below, count = len(bits), len(spare), last.shape[1]
    states, tags, memory_mask = 1 << survivors, (1 << tag) - 1, (1 << (state_bits - k)) - 1
    width = tag + below
    for r in prange(rows):
        metric, word = np.empty(states, np.int32), np.empty(states, np.int32)
        next_metric, next_word = np.empty(states, np.int32), np.empty(states, np.int32)
        numbers, minima = _numbers(state_bits, k, survivors, tag, below, unit, multiplier), np.empty(LANES, np.int32)
        starts, factors = np.empty(len(per_window), np.int32), np.empty(len(per_window), np.int32)
        history = np.empty((length - count, states), np.uint8)
        memory: Any = 0
        _open(metric, word, k, below, multiplier)
        if start.shape[0]:
            memory = start[r]
            first = memory & (states - 1)
            metric += np.int32(CLOSED * unit)
            metric[first] = ((memory >> (survivors - k)) & tags) << below
            word[first] = np.int32((memory << k) * multiplier)
        for i in range(length - count):
            _step(
                bits, per_window, tile, spare, code, steps, starts, factors, word, metric, next_word, next_metric, history[i],
                minima, numbers, x[r, i], unreal,
            )  # fmt: skip
            word, metric, next_word, next_metric = next_word, next_metric, word, metric
        oldest: Any = 0
        state, least = 0, np.int64(1) << 62
        seen = state_bits - k * count  # bits of the first of the last symbols that other windows see too
        options = 1 << (k - seen) if count else 1
        for i in range(states):  # every survivor goes on with the last symbols
            for free in range(options):
                memory, cost = (np.int64(word[i]) * inverse & MASK32) >> k, (np.int64(metric[i]) >> width) << width
                first = (np.int64(last[r, 0]) & ((1 << seen) - 1)) | (free << seen) if count else 0
                for j in range(count):
                    window = (memory << k) | (first if j == 0 else np.int64(last[r, j]))
                    memory = window & memory_mask
                    for v in range(len(per_window)):
                        if x[r, length - count + j, v] < unreal:
                            error = np.int64(x[r, length - count + j, v]) - np.int64(table[v, window])
                            cost += error * error
                if cost < least:
                    state, oldest, least = i, first, cost
        for j in range(count):
            out[r, length - count + j] = oldest if j == 0 else last[r, j]
        _trace(history, state, k, below, out[r])


@lru_cache(maxsize=8)
def _tables(code: TrellisCode, width: int) -> tuple[Any, Any, Any]:
    """Return what errors start from and what bytes are multiplied with, int32 [2, V]; the distances of the words of a state's
    edges from its own, int32; and the values of every window for the last steps, int32 [V, 2^L]."""
    scale, how = 1 << -(-width // 2), way()
    starts, factors = [], []
    for own, offset in code.sums:
        if code.weights == 1:
            mask, times = pattern(how, 1)
            factors.append((scale & mask) * times)
        else:
            factors.append(sum((scale * factor & 255) << 8 * i for i, factor in enumerate(own)))
        starts.append(scale * (shortfall(how, code.weights) * sum(own) - offset))
    distances = [
        (code.multiplier * (lane % (1 << code.symbol_bits)) + code.key)
        for lane in range(max(LANES, 1 << code.symbol_bits))
    ]
    words = np.array([starts, factors], np.int64).astype(np.uint32), np.array(distances, np.int64).astype(np.uint32)
    return words[0].view(np.int32), words[1].view(np.int32), table(code, width).to(torch.int32).contiguous().numpy()


def walk(x: Tensor, code: TrellisCode, survivors: int, boundary: Boundary | None = None) -> Tensor:
    """Do as `search_reference.walk`, bit for bit."""
    tag = code.tag_bits(survivors)
    spare = (0,) * (code.weights if tag + code.weights <= 8 else 0)  # errors stay within 16 bits
    width = tag + len(spare)
    scale = 1 << -(-width // 2)
    scaled = (x * scale).to(torch.int32).contiguous().numpy()
    nothing = torch.empty(0, dtype=torch.int64)
    memory, last, _ = boundary or Boundary(nothing, nothing.expand(len(x), 0), nothing)
    start, end, unreal = memory.contiguous().numpy(), last.contiguous().numpy(), np.int32(PADDING * scale)
    out, bits = torch.empty(x.shape[:2], dtype=torch.uint8), (0,) * code.symbol_bits
    minima = MINIMA[target_has("avx512f")] // max(1, (1 << code.symbol_bits) // LANES)
    vectors = max(1, (1 << survivors) // max(LANES, 1 << code.symbol_bits))
    tile = (0,) * min(max(1, minima), vectors)
    _walk(
        bits, (0,) * code.weights, tile, spare, scaled, *_tables(code, width), code.state_bits, survivors, tag,
        (scale >> -(-tag // 2)) ** 2, code.multiplier, pow(code.multiplier, -1, 1 << 32), start, end, unreal, out.numpy(),
    )  # fmt: skip
    return out
