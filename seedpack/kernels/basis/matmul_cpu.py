"""Products with basis weights on the CPU: for few tokens a piece of a row is generated and multiplied in the L1 cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from seedpack.kernels.basis.decode_cpu import LANES, constants, reduce_rows, row_piece, some_rows
from seedpack.kernels.basis.decode_reference import rows_per_block
from seedpack.kernels.common import row_tiles as tiles


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


def matmul(x: Tensor, coefs: Tensor, seed: int, generator: str, rows: int) -> Tensor:
    """As `reference.matmul`, summed in another order."""
    if len(x) > tiles.FEW_TOKENS:
        return tiles.matmul(x, rows, _tile(coefs, seed, generator, rows, x.shape[1]))
    out = torch.empty(len(x), rows, dtype=torch.float32)
    values, given = (value.detach().float().contiguous().numpy() for value in (coefs, x))
    _matmul(values, rows_per_block(rows, len(coefs)), *constants(seed, generator), given, out.numpy())
    return out.to(x.dtype)


def matmul_transposed(grad: Tensor, coefs: Tensor, seed: int, generator: str, columns: int) -> Tensor:
    """As `reference.matmul_transposed`, summed in another order."""
    return tiles.matmul_transposed(grad, columns, _tile(coefs, seed, generator, grad.shape[1], columns))


def _tile(coefs: Tensor, seed: int, generator: str, rows: int, columns: int) -> tiles.Tile:
    return lambda some: some_rows(coefs, seed, generator, rows, columns, torch.arange(some.start, some.stop))


def grad_coefs(grad: Tensor, x: Tensor, blocks: int, count: int, seed: int, generator: str) -> Tensor:
    """As `reference.grad_coefs`, summed in another order; the weight's gradient is made some rows at a time."""
    rows = grad.shape[1]
    index, of_rows = torch.arange(rows), torch.empty(rows, count, dtype=torch.float32)
    grads, given = grad.detach().float(), x.detach().float()
    for some in tiles.row_slices(rows, x.shape[1]):
        reduce_rows(grads[:, some].T @ given, index[some], seed, generator, of_rows[some])
    return torch.zeros(blocks, count).index_add_(0, index // rows_per_block(rows, blocks), of_rows)
