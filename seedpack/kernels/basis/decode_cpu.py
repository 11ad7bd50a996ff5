"""Basis weights on the CPU: each weight's noise is generated and multiplied in registers, rows shared among the cores.

A block of Philox gives four words for some 100 operations: 25 per word; Squirrel5 takes 13. A weight costs M words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seedpack.kernels.basis.decode_reference import SQUIRREL_STRIDE, UNIT
from seedpack.kernels.basis.dense_noise import DenseNoise
from seedpack.kernels.basis.noise_basis import rows_per_block
from seedpack.kernels.common.jit import jit

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


@jit()
def row_piece(first: Any, coefs: Any, philox: bool, key0: Any, key1: Any, out: Any) -> None:
    """Store in out[i] the weight at place first + i."""
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
