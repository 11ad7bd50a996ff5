"""Products with a weight that is rebuilt some rows at a time: no more than a tile of it is ever dense."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TILE_WEIGHTS = 1 << 21  # float32 of a tile: 8 MB, measured best; smaller ones change between thread pools too often
Tile = Callable[[slice], Tensor]  # some rows of the weight, float32 [rows, columns]


def _slices(rows: int, columns: int) -> list[slice]:
    step = max(16, TILE_WEIGHTS // columns)
    return [slice(row, min(rows, row + step)) for row in range(0, rows, step)]


def matmul(x: Tensor, rows: int, tile: Tile) -> Tensor:
    """x [tokens, columns] times the weight [rows, columns] transposed; summed in float32, in the dtype of x."""
    columns = x.float().T.contiguous()
    out = torch.empty(rows, x.shape[0], dtype=torch.float32, device=x.device)
    for some in _slices(rows, x.shape[1]):
        torch.mm(tile(some), columns, out=out[some])
    return out.T.to(x.dtype)


def matmul_transposed(grad: Tensor, columns: int, tile: Tile) -> Tensor:
    """grad [tokens, rows] times the weight [rows, columns]; summed in float32, in the dtype of grad."""
    grads = grad.float()
    out = torch.zeros(grad.shape[0], columns, dtype=torch.float32, device=grad.device)
    for some in _slices(grad.shape[1], columns):
        out.addmm_(grads[:, some], tile(some))
    return out.to(grad.dtype)
