"""Products with basis weights on the CPU: for few tokens a piece of a row is generated and multiplied in the L1 cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from seedpack.kernels import tiles
from seedpack.kernels.basis_decode.cpu import (
    LANES,
    U,
    constants,
    number,
    philox_words,
    row_piece,
    some_rows,
    squirrel5_word,
)
from seedpack.kernels.basis_decode.reference import SQUIRREL_STRIDE, rows_per_block


@njit(parallel=True, cache=True, nogil=True, fastmath=True)
def _matmul(coefs: Any, per_block: int, philox: bool, key0: Any, key1: Any, x: Any, out: Any) -> None:
    tokens, columns = x.shape
    for r in prange(out.shape[1]):
        piece = np.empty(LANES, np.float32)
        out[:, r] = 0
        for c in range(0, columns, LANES):
            here = piece[: min(LANES, columns - c)]
            row_piece(np.uint64(r) * np.uint64(columns) + np.uint64(c), coefs[r // per_block], philox, key0, key1, here)
            for t in range(tokens):
                total = np.float32(0)
                for i in range(here.shape[0]):
                    total += here[i] * x[t, c + i]
                out[t, r] += total


@njit(parallel=True, cache=True, nogil=True, fastmath=True)
def _reduce(weight_grad: Any, first: int, philox: bool, key0: Any, key1: Any, out: Any) -> None:
    """out [rows, count] = for each row Σ_c noise(c, m)·weight_grad[row, c]; row 0 is row `first` of the weight."""
    rows, columns = weight_grad.shape
    count = out.shape[1]
    for r in prange(rows):
        start = np.uint64(first + r) * np.uint64(columns)
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


def matmul(x: Tensor, coefs: Tensor, seed: int, generator: str, rows: int) -> Tensor:
    """As `reference.matmul`, summed in another order."""
    if len(x) > tiles.FEW_TOKENS:
        return tiles.matmul(x, rows, lambda some: some_rows(coefs, seed, generator, rows, x.shape[1], some))
    out = torch.empty(len(x), rows, dtype=torch.float32)
    values, given = (value.detach().float().contiguous().numpy() for value in (coefs, x))
    _matmul(values, rows_per_block(rows, len(coefs)), *constants(seed, generator), given, out.numpy())
    return out.to(x.dtype)


def matmul_transposed(grad: Tensor, coefs: Tensor, seed: int, generator: str, columns: int) -> Tensor:
    """As `reference.matmul_transposed`, summed in another order."""
    rows = grad.shape[1]
    return tiles.matmul_transposed(grad, columns, lambda some: some_rows(coefs, seed, generator, rows, columns, some))


def grad_coefs(grad: Tensor, x: Tensor, blocks: int, count: int, seed: int, generator: str) -> Tensor:
    """As `reference.grad_coefs`, summed in another order; the weight's gradient is made some rows at a time."""
    rows = grad.shape[1]
    of_rows = torch.empty(rows, count, dtype=torch.float32)
    grads, given = grad.detach().float(), x.detach().float()
    for some in tiles.row_slices(rows, x.shape[1]):
        weight_grad = grads[:, some].T @ given
        _reduce(weight_grad.numpy(), some.start, *constants(seed, generator), of_rows[some].numpy())
    block = torch.arange(rows) // rows_per_block(rows, blocks)
    return torch.zeros(blocks, count).index_add_(0, block, of_rows)
