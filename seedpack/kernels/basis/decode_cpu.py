"""Basis weights on the CPU: each weight's noise is generated and multiplied in registers, rows shared among the cores.

A block of Philox gives four words for ten rounds of six operations on eight lanes of 64 bits each: 15 per word and eight weights;
Squirrel5 takes 13 for sixteen. A weight costs M words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from torch import Tensor

from seedpack.kernels.basis.decode_reference import SQUIRREL_STRIDE, UNIT
from seedpack.kernels.basis.dense_noise import DenseNoise
from seedpack.kernels.basis.noise_basis import rows_per_block
from seedpack.kernels.common.jit import jit
from seedpack.kernels.common.vectors import FLOATS, I32, I64, data, intrinsic, load, splat, spread, store
from seedpack.kernels.common.vectors import LANES as LANES16

LANES = 64  # weights whose sums are kept at a time
F, U = np.float32, np.uint32


@jit(inline="always")
def philox_words(n: Any, group: Any, key0: Any, key1: Any) -> Any:
    """Return four words of Philox4x32-10 (`prng.philox`)."""
    c0, c1, c2, c3 = U(n & np.uint64(0xFFFFFFFF)), U(n >> np.uint64(32)), U(group), U(0)
    k0, k1 = U(key0), U(key1)
    for _ in range(10):
        one, two = np.uint64(0xD2511F53) * np.uint64(c0), np.uint64(0xCD9E8D57) * np.uint64(c2)
        c0, c1 = U(two >> np.uint64(32)) ^ c1 ^ k0, U(two)
        c2, c3 = U(one >> np.uint64(32)) ^ c3 ^ k1, U(one)
        k0, k1 = U(k0 + U(0x9E3779B9)), U(k1 + U(0xBB67AE85))
    return c0, c1, c2, c3


@jit(inline="always")
def squirrel5_word(position: Any, seed: Any) -> Any:
    """Return a word of `prng.squirrel5`."""
    x = U(U(position) * U(0xD2A80A3F) + seed)
    x ^= x >> U(9)
    x = U(x + U(0xA884F197))
    x ^= x >> U(11)
    x = U(x * U(0x6C736F4B))
    x ^= x >> U(13)
    x = U(x + U(0xB79F3ABB))
    x ^= x >> U(15)
    x = U(x * U(0x1B56C4F5))
    return x ^ (x >> U(17))


@jit(inline="always")
def number(word: Any) -> Any:
    """Return a word as a signed integer, times 2^-31."""
    return F(np.int32(word)) * F(UNIT)


@intrinsic
def _philox16(
    context: Any, first: Any, group: Any, key0: Any, key1: Any, a: Any, b: Any, c: Any, d: Any, out: Any, at: Any
) -> Any:
    """Add to out[at … at + 15] the numbers of four words of Philox for places first + 0 … 15, times a, b, c and d.

    Words stand in lanes of 64 bits, whose upper halves are left to be anything: one instruction multiplies the lower halves.
    Nothing is fused: every processor gives the same bits.
    """
    word, whole = types.float32, types.uint64
    signature = types.void(whole, whole, types.uint32, types.uint32, word, word, word, word, out, types.int64)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes, words = ir.VectorType(I64, LANES16 // 2), ir.VectorType(I32, LANES16 // 2)
        low = splat(lanes, 0xFFFFFFFF)

        def times(value: Any, constant: int) -> Any:
            return builder.mul(builder.and_(value, low), splat(lanes, constant))

        def high(value: Any) -> Any:
            return builder.lshr(value, splat(lanes, 32))

        keys = [spread(builder, builder.zext(key, I64), lanes) for key in args[2:4]]
        halves = []
        for half in range(2):
            places = ir.Constant(lanes, [half * LANES16 // 2 + i for i in range(LANES16 // 2)])
            c0 = builder.add(spread(builder, args[0], lanes), places)
            c1, c2, c3 = high(c0), spread(builder, args[1], lanes), splat(lanes, 0)
            k0, k1 = keys
            for _ in range(10):
                one, two = times(c0, 0xD2511F53), times(c2, 0xCD9E8D57)
                c0, c1 = builder.xor(builder.xor(high(two), c1), k0), two
                c2, c3 = builder.xor(builder.xor(high(one), c3), k1), one
                k0, k1 = builder.add(k0, splat(lanes, 0x9E3779B9)), builder.add(k1, splat(lanes, 0xBB67AE85))
            halves.append([builder.trunc(value, words) for value in (c0, c1, c2, c3)])
        place = builder.gep(data(ctx, builder, signature.args[8], args[8]), [args[9]])
        total, joined = None, ir.VectorType(I32, LANES16)
        for left, right, factor in zip(*halves, args[4:8], strict=True):
            both = builder.shuffle_vector(left, right, ir.Constant(joined, list(range(LANES16))))
            value = builder.fmul(builder.sitofp(both, FLOATS), splat(FLOATS, UNIT))
            product = builder.fmul(value, spread(builder, factor, FLOATS))
            total = product if total is None else builder.fadd(total, product)
        store(builder, builder.fadd(load(builder, place, FLOATS), total), place)
        return ctx.get_dummy_value()

    return signature, codegen


@jit()
def row_piece(first: Any, coefs: Any, philox: bool, key0: Any, key1: Any, out: Any) -> None:
    """Store in out[i] the weight at place first + i."""
    count = coefs.shape[0]
    out[:] = 0
    if philox:
        whole = out.shape[0] // LANES16 * LANES16
        for group in range(-(-count // 4)):
            a = coefs[4 * group]
            b = coefs[4 * group + 1] if 4 * group + 1 < count else F(0)
            c = coefs[4 * group + 2] if 4 * group + 2 < count else F(0)
            d = coefs[4 * group + 3] if 4 * group + 3 < count else F(0)
            for i in range(0, whole, LANES16):
                _philox16(np.uint64(first) + np.uint64(i), np.uint64(group), key0, key1, a, b, c, d, out, i)
            for i in range(whole, out.shape[0]):
                w0, w1, w2, w3 = philox_words(np.uint64(first) + np.uint64(i), group, key0, key1)
                out[i] += number(w0) * a + number(w1) * b + number(w2) * c + number(w3) * d
    else:
        for m in range(count):
            start = U(np.uint64(first) + np.uint64(SQUIRREL_STRIDE) * np.uint64(m))
            for i in range(out.shape[0]):
                out[i] += number(squirrel5_word(U(start + U(i)), key0)) * coefs[m]


@jit(parallel=True)
def _dense(coefs: Any, per_block: int, philox: bool, key0: Any, key1: Any, index: Any, out: Any) -> None:
    """Store in out[i] row index[i] of the weight."""
    rows, columns = out.shape
    for i in prange(rows):
        start = np.uint64(index[i]) * np.uint64(columns)
        for c in range(0, columns, LANES):
            piece = out[i, c : min(columns, c + LANES)]
            row_piece(start + np.uint64(c), coefs[index[i] // per_block], philox, key0, key1, piece)


def constants(basis: DenseNoise) -> tuple[bool, Any, Any]:
    """Return which generator it is, and its seed in two words."""
    return basis.philox, U(basis.seed & 0xFFFFFFFF), U(basis.seed >> 32 & 0xFFFFFFFF)


def dense(coefs: Tensor, basis: DenseNoise, rows: int, columns: int, index: Tensor) -> Tensor:
    """Do as `decode_reference.dense`: the same words, summed in another order."""
    out = torch.empty(len(index), columns, dtype=torch.float32)
    values = coefs.detach().float().contiguous().numpy()
    _dense(values, rows_per_block(rows, len(coefs)), *constants(basis), index.numpy(), out.numpy())
    return out
