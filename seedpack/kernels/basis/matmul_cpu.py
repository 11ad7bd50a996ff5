"""Products with basis weights on the CPU: for few tokens a piece of a row is generated and multiplied in the L1 cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seedpack.kernels.basis.decode_cpu import (
    LANES,
    U,
    constants,
    dense,
    number,
    philox_words,
    row_piece,
    squirrel5_word,
)
from seedpack.kernels.basis.decode_reference import SQUIRREL_STRIDE
from seedpack.kernels.basis.dense_noise import DenseNoise
from seedpack.kernels.basis.noise_basis import rows_per_block
from seedpack.kernels.common import row_tiles
from seedpack.kernels.common.jit import jit


@jit(parallel=True, fastmath=True)
def _matmul(coefs: Any, per_block: int, philox: bool, key0: Any, key1: Any, x: Any, out: Any) -> None:
    tokens, columns = x.shape
    for r in prange(out.shape[1]):
        piece = np.empty(LANES, np.float32)
        out[:, r] = 0
        for c in range(0, columns, LANES):
            weights = piece[: min(LANES, columns - c)]
            row_piece(
                np.uint64(r) * np.uint64(columns) + np.uint64(c), coefs[r // per_block], philox, key0, key1, weights
            )
            for t in range(tokens):
                total = np.float32(0)
                for i in range(weights.shape[0]):
                    total += weights[i] * x[t, c + i]
                out[t, r] += total


@jit(parallel=True, fastmath=True)
def _reduce(weight_grad: Any, index: Any, philox: bool, key0: Any, key1: Any, out: Any) -> None:
    """Store in out [rows, count] for each row Σ_c noise(c, m)·weight_grad[row, c]; row i is row index[i] of the weight."""
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


def matmul(x: Tensor, coefs: Tensor, basis: DenseNoise, rows: int) -> Tensor:
    """Do as `matmul_reference.matmul`, summed in another order."""
    if len(x) > row_tiles.FEW_TOKENS:
        return row_tiles.matmul(x, rows, _tile(coefs, basis, rows, x.shape[1]))
    out = torch.empty(len(x), rows, dtype=torch.float32)
    values, tokens = (value.detach().float().contiguous().numpy() for value in (coefs, x))
    _matmul(values, rows_per_block(rows, len(coefs)), *constants(basis), tokens, out.numpy())
    return out.to(x.dtype)


def matmul_transposed(grad: Tensor, coefs: Tensor, basis: DenseNoise, columns: int) -> Tensor:
    """Do as `matmul_reference.matmul_transposed`, summed in another order."""
    return row_tiles.matmul_transposed(grad, columns, _tile(coefs, basis, grad.shape[1], columns))


def _tile(coefs: Tensor, basis: DenseNoise, rows: int, columns: int) -> row_tiles.Tile:
    return lambda part: dense(coefs, basis, rows, columns, torch.arange(part.start, part.stop))


def grad_coefs(grad: Tensor, x: Tensor, blocks: int, count: int, basis: DenseNoise) -> Tensor:
    """Do as `matmul_reference.grad_coefs`, summed in another order; the weight's gradient is made some rows at a time."""
    rows = grad.shape[1]
    index, row_sums = torch.arange(rows), torch.empty(rows, count, dtype=torch.float32)
    grads, tokens = grad.detach().float(), x.detach().float()
    for part in row_tiles.row_slices(rows, x.shape[1]):
        _reduce_rows(grads[:, part].T @ tokens, index[part], basis, row_sums[part])
    return torch.zeros(blocks, count, dtype=row_sums.dtype).index_add_(
        0, index // rows_per_block(rows, blocks), row_sums
    )


def reduce(weight_grad: Tensor, blocks: int, count: int, basis: DenseNoise, rows: int, index: Tensor) -> Tensor:
    """Do as `matmul_reference.reduce`, summed in another order."""
    row_sums = torch.empty(len(index), count, dtype=torch.float32)
    _reduce_rows(weight_grad, index, basis, row_sums)
    return torch.zeros(blocks, count, dtype=row_sums.dtype).index_add_(
        0, index // rows_per_block(rows, blocks), row_sums
    )


def _reduce_rows(weight_grad: Tensor, index: Tensor, basis: DenseNoise, out: Tensor) -> None:
    """Sum noise·weight_grad over each row into out [n, count]; index int64 [n] says which rows of the weight they are."""
    values = weight_grad.detach().float().contiguous().numpy()
    _reduce(values, index.numpy(), *constants(basis), out.numpy())
