"""SeedLM decoding on the CPU: 16 blocks of a row in the lanes of vectors, rows shared among the cores.

The states that follow a seed are the windows of one bit sequence that begins with it. The sequence is grown by the
register's rule, several bits at a time; then each state is a shift of two words and a mask. A weight costs, for its
P states, a shift, a mask, a multiplication and an addition each, and a conversion.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from torch import Tensor

from seedpack.errors import CodecError
from seedpack.kernels.common.jit import jit
from seedpack.kernels.common.vectors import (
    FLOATS,
    I64,
    INTS,
    LANES,
    ROWS_AT_ONCE,
    data,
    intrinsic,
    splat,
    spread,
    store,
    words_at,
)
from seedpack.kernels.seedlm.code import CODE_BITS, SeedLMCode, SeedLMParts
from seedpack.prng import LFSR_TAPS

MARGIN = 20  # bytes behind a group that its loads may take


def _extracted(builder: Any, words: list[Any], start: int, bits: int) -> Any:
    """Emit IR for `bits` bits from bit `start` on of each lane's sequence; its words beyond those made so far are zero."""
    word, shift = divmod(start, 32)
    value = builder.lshr(words[word], splat(INTS, shift)) if shift else words[word]
    if shift + bits > 32:
        value = builder.or_(value, builder.shl(words[word + 1], splat(INTS, 32 - shift)))
    return builder.and_(value, splat(INTS, (1 << bits) - 1)) if bits < 32 else value


def _sequence(builder: Any, seeds: Any, seed_bits: int, length: int) -> list[Any]:
    """Emit IR for the bits that a register of K bits gives, from the seed's own on, in words of 32.

    b[n + K·s] = XOR_j b[n + j·s] for powers of two s: with more bits known, more come at once.
    """
    words = [splat(INTS, 0)] * (-(-length // 32) + 1)
    words[0] = seeds
    known, taps = seed_bits, LFSR_TAPS[seed_bits]
    while known < length:
        stride = 1
        while 2 * stride * seed_bits <= known:
            stride *= 2
        count = min(stride * (seed_bits - max(taps)), length - known, 32 - known % 32)
        first = known - stride * seed_bits
        new = _extracted(builder, words, first + stride * taps[0], count)
        for tap in taps[1:]:
            new = builder.xor(new, _extracted(builder, words, first + stride * tap, count))
        words[known // 32] = builder.or_(words[known // 32], builder.shl(new, splat(INTS, known % 32)))
        known += count
    return words


def _signed_field(builder: Any, codes: Any, stride: int, offset: int) -> Any:
    field = builder.and_(words_at(builder, codes, stride, CODE_BITS, offset), splat(INTS, 15))
    return builder.sub(builder.xor(field, splat(INTS, 8)), splat(INTS, 8))


def blocks16(
    builder: Any, seeds: Any, codes: Any, group: Any, bias: Any, seed_bits: int, block: int, rank: int
) -> tuple[list[Any], Any]:
    """Emit IR for blocks 16·group … 16·group + 15 of a row: for each c the integers Σ_p V'[c, p]·q[p], and 2^(e + bias)."""
    stride = CODE_BITS * (rank + 1)
    seeds = builder.gep(seeds, [builder.mul(group, ir.Constant(I64, 2 * seed_bits))])
    codes = builder.gep(codes, [builder.mul(group, ir.Constant(I64, 2 * stride))])
    mask = splat(INTS, (1 << seed_bits) - 1)
    first = builder.and_(words_at(builder, seeds, seed_bits, seed_bits), mask)
    words = _sequence(builder, first, seed_bits, seed_bits + block * rank)
    mantissas = [_signed_field(builder, codes, stride, CODE_BITS * (p + 1)) for p in range(rank)]
    sums = mantissas[0]
    for mantissa in mantissas[1:]:
        sums = builder.add(sums, mantissa)
    centre = builder.shl(sums, splat(INTS, seed_bits - 1))
    totals = []
    for c in range(block):
        value = builder.sub(splat(INTS, 0), centre)
        for p in range(rank):
            state = _extracted(builder, words, c * rank + p + 1, seed_bits)
            value = builder.add(value, builder.mul(state, mantissas[p]))
        totals.append(value)
    power = builder.add(_signed_field(builder, codes, stride, 0), spread(builder, bias, INTS))
    return totals, builder.bitcast(builder.shl(power, splat(INTS, 23)), FLOATS)


@intrinsic
def _decode16(
    context: Any, bits: Any, block: Any, rank: Any, seeds: Any, codes: Any, group: Any, bias: Any, unit: Any, out: Any
) -> Any:
    """Store in out[c, i] weight c of block 16·group + i. `bias` is the exponent's and float32's own, 127."""
    signature = types.void(bits, block, rank, seeds, codes, types.int64, types.int32, types.float32, out)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        seeds_at, codes_at, out_at = (data(ctx, builder, signature.args[i], args[i]) for i in (3, 4, 8))
        sizes = (bits.count, block.count, rank.count)
        totals, scale = blocks16(builder, seeds_at, codes_at, args[5], args[6], *sizes)
        for c, value in enumerate(totals):
            scaled = builder.fmul(builder.sitofp(value, FLOATS), spread(builder, args[7], FLOATS))
            store(builder, builder.fmul(scaled, scale), builder.gep(out_at, [ir.Constant(I64, LANES * c)]))
        return ctx.get_dummy_value()

    return signature, codegen


@jit()
def whole_groups(size: int, group_bytes: int) -> int:
    """Count the groups of a row of `size` bytes whose loads stay inside it."""
    return max(0, (size - group_bytes - MARGIN) // group_bytes + 1)


@jit()
def tail_buffer(size: int, group_bytes: int) -> Any:
    """Make room for the last bytes of a row, with zeros behind them for whole loads."""
    return np.zeros(size + group_bytes + MARGIN, np.uint8)


@jit(parallel=True)
def _dense(bits: Any, block: Any, rank: Any, seeds: Any, codes: Any, bias: Any, unit: Any, out: Any) -> None:
    columns = out.shape[1]
    seed_bytes, code_bytes, c = 2 * len(bits), 8 * (len(rank) + 1), len(block)
    groups = -(-columns // (c * LANES))
    inside = min(groups, whole_groups(seeds.shape[1], seed_bytes), whole_groups(codes.shape[1], code_bytes))
    rows = seeds.shape[0]
    rest_seeds, rest_codes = seeds.shape[1] - inside * seed_bytes, codes.shape[1] - inside * code_bytes
    for chunk in prange(-(-rows // ROWS_AT_ONCE)):
        values = np.empty((c, LANES), np.float32)
        last_seeds, last_codes = tail_buffer(rest_seeds, seed_bytes), tail_buffer(rest_codes, code_bytes)
        for r in range(chunk * ROWS_AT_ONCE, min(rows, (chunk + 1) * ROWS_AT_ONCE)):
            last_seeds[:rest_seeds] = seeds[r, inside * seed_bytes :]
            last_codes[:rest_codes] = codes[r, inside * code_bytes :]
            for group in range(groups):
                if group < inside:
                    _decode16(bits, block, rank, seeds[r], codes[r], group, bias, unit, values)
                else:
                    _decode16(bits, block, rank, last_seeds, last_codes, group - inside, bias, unit, values)
                to = out[r, group * LANES * c : (group + 1) * LANES * c]
                for i in range(-(-to.shape[0] // c)):
                    weights = to[i * c : (i + 1) * c]
                    for j in range(weights.shape[0]):
                        weights[j] = values[j, i]


def constants(code: SeedLMCode, exponent_bias: Tensor) -> tuple[Any, Any, Any]:
    """Return what the compiled code takes: K, C and P as lengths of tuples (constants there), bias and unit."""
    bias = int(exponent_bias)
    if not -118 <= bias <= 120:  # beyond, 2^(e + bias) is no normal float32
        raise CodecError(f"seedlm: exponent bias {bias} is not in -118 … 120")
    return ((0,) * code.seed_bits, (0,) * code.block, (0,) * code.rank), np.int32(bias + 127), np.float32(code.unit)


def decode(parts: SeedLMParts, code: SeedLMCode, columns: int, dtype: torch.dtype) -> Tensor:
    """Do as `decode_reference.decode`, bit for bit."""
    (k, c, p), bias, unit = constants(code, parts.exponent_bias)
    out = torch.empty(parts.seeds.shape[0], columns, dtype=torch.float32)
    seeds, codes = (part.contiguous().flatten(1).numpy() for part in parts[:2])
    _dense(k, c, p, seeds, codes, bias, unit, out.numpy())
    return out.to(dtype)
