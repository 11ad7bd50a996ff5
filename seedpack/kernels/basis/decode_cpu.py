"""Basis weights on the CPU: each weight's noise is generated and multiplied in registers, a row a core.

A block of Philox gives four words for some 100 operations: 25 a word; Squirrel5 takes 13. A weight costs M words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from seedpack.kernels.basis.decode_reference import SQUIRREL_STRIDE, UNIT, rows_per_block

LANES = 64  # weights whose sums are kept at a time
F, U = np.float32, np.uint32


@njit(inline="always")
def philox_words(n: Any, group: Any, key0: Any, key1: Any) -> Any:
    """Four words of Philox4x32-10 (`prng.philox`)."""
    c0, c1, c2, c3 = U(n & np.uint64(0xFFFFFFFF)), U(n >> np.uint64(32)), U(group), U(0)
    k0, k1 = U(key0), U(key1)
    for _ in range(10):
        one, two = np.uint64(0xD2511F53) * np.uint64(c0), np.uint64(0xCD9E8D57) * np.uint64(c2)
        c0, c1 = U(two >> np.uint64(32)) ^ c1 ^ k0, U(two)
        c2, c3 = U(one >> np.uint64(32)) ^ c3 ^ k1, U(one)
        k0, k1 = U(k0 + U(0x9E3779B9)), U(k1 + U(0xBB67AE85))
    return c0, c1, c2, c3


@njit(inline="always")
def squirrel5_word(position: Any, seed: Any) -> Any:
    """A word of `prng.squirrel5`."""
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


@njit(inline="always")
def number(word: Any) -> Any:
    """A word as a signed integer, times 2^-31."""
    return F(np.int32(word)) * F(UNIT)


@njit(cache=True, nogil=True)
def row_piece(first: Any, coefs: Any, philox: bool, key0: Any, key1: Any, out: Any) -> None:
    """out[i] = the weight at place first + i."""
    count = coefs.shape[0]
    out[:] = 0
    if philox:
        for group in range(-(-count // 4)):
            a = coefs[4 * group]
            b = coefs[4 * group + 1] if 4 * group + 1 < count else F(0)
            c = coefs[4 * group + 2] if 4 * group + 2 < count else F(0)
            d = coefs[4 * group + 3] if 4 * group + 3 < count else F(0)
            for i in range(out.shape[0]):
                w0, w1, w2, w3 = philox_words(np.uint64(first) + np.uint64(i), group, key0, key1)
                out[i] += number(w0) * a + number(w1) * b + number(w2) * c + number(w3) * d
    else:
        for m in range(count):
            start = U(np.uint64(first) + np.uint64(SQUIRREL_STRIDE) * np.uint64(m))
            for i in range(out.shape[0]):
                out[i] += number(squirrel5_word(U(start + U(i)), key0)) * coefs[m]


@njit(parallel=True, cache=True, nogil=True)
def _dense(coefs: Any, per_block: int, philox: bool, key0: Any, key1: Any, index: Any, out: Any) -> None:
    """out[i] = row index[i] of the weight."""
    rows, columns = out.shape
    for i in prange(rows):
        start = np.uint64(index[i]) * np.uint64(columns)
        for c in range(0, columns, LANES):
            piece = out[i, c : min(columns, c + LANES)]
            row_piece(start + np.uint64(c), coefs[index[i] // per_block], philox, key0, key1, piece)


@njit(parallel=True, cache=True, nogil=True, fastmath=True)
def _reduce(weight_grad: Any, index: Any, philox: bool, key0: Any, key1: Any, out: Any) -> None:
    """out [rows, count] = for each row Σ_c noise(c, m)·weight_grad[row, c]; row i is row index[i] of the weight."""
    rows, columns = weight_grad.shape
    count = out.shape[1]
    for r in prange(rows):
        start = np.uint64(index[r]) * np.uint64(columns)
        for m in range(0, count, 4):
            s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for c in range(columns):
                place, value = start + np.uint64(c), weight_grad[r, c]
                if philox:
                    w0, w1, w2, w3 = philox_words(place, m >> 2, key0, key1)
                    s0 += number(w0) * value
                    s1 += number(w1) * value
                    s2 += number(w2) * value
                    s3 += number(w3) * value
                else:
                    at = U(place + np.uint64(SQUIRREL_STRIDE) * np.uint64(m))
                    s0 += number(squirrel5_word(at, key0)) * value
                    s1 += number(squirrel5_word(U(at + U(SQUIRREL_STRIDE)), key0)) * value
                    s2 += number(squirrel5_word(U(at + U(2 * SQUIRREL_STRIDE)), key0)) * value
                    s3 += number(squirrel5_word(U(at + U(3 * SQUIRREL_STRIDE)), key0)) * value
            sums = (s0, s1, s2, s3)
            for j in range(min(4, count - m)):
                out[r, m + j] = sums[j]


def constants(seed: int, generator: str) -> tuple[bool, Any, Any]:
    """Which generator, and its key in two words."""
    return generator == "philox", U(seed & 0xFFFFFFFF), U(seed >> 32 & 0xFFFFFFFF)


def some_rows(coefs: Tensor, seed: int, generator: str, rows: int, columns: int, index: Tensor) -> Tensor:
    """Some rows of a weight of `rows` rows, float32 [n, columns]; index int64 [n]."""
    out = torch.empty(len(index), columns, dtype=torch.float32)
    values = coefs.detach().float().contiguous().numpy()
    _dense(values, rows_per_block(rows, len(coefs)), *constants(seed, generator), index.numpy(), out.numpy())
    return out


def reduce_rows(weight_grad: Tensor, index: Tensor, seed: int, generator: str, out: Tensor) -> None:
    """Σ_c noise·weight_grad of each row into out [n, count]; index int64 [n] says which rows of the weight they are."""
    given = weight_grad.detach().float().contiguous().numpy()
    _reduce(given, index.numpy(), *constants(seed, generator), out.numpy())


def dense(coefs: Tensor, seed: int, generator: str, rows: int, columns: int, index: Tensor) -> Tensor:
    """As `reference.dense`: the same words, summed in another order."""
    return some_rows(coefs, seed, generator, rows, columns, index)


def reduce(weight_grad: Tensor, blocks: int, count: int, seed: int, generator: str, rows: int, index: Tensor) -> Tensor:
    """As `reference.reduce`, summed in another order."""
    of_rows = torch.empty(len(index), count, dtype=torch.float32)
    reduce_rows(weight_grad, index, seed, generator, of_rows)
    return torch.zeros(blocks, count).index_add_(0, index // rows_per_block(rows, blocks), of_rows)
