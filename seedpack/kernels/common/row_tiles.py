"""What the fused products share: tokens padded to what code is compiled for, and products with a weight that is rebuilt
some rows at a time, so that no more than a tile of it is ever dense."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TILE_WEIGHTS = 1 << 21  # float32 of a tile: 8 MB, measured best; smaller ones change between thread pools too often
FEW_TOKENS = 8  # up to so many the weights are regenerated inside the product, beyond it tile by tile
AT_ONCE = (1, 2, 4, 8)  # tokens of one pass over the weights; code is compiled for each
Tile = Callable[[slice], Tensor]  # some rows of the weight, float32 [rows, columns]


def at_once(tokens: int) -> int:
    """For how many tokens code is run."""
    return next(count for count in AT_ONCE if count >= tokens)


def padded_tokens(x: Tensor, columns: int) -> Tensor:
    """x [tokens, n] in float32 with zeros for further columns, and for further tokens up to the next of `AT_ONCE`."""
    tokens = at_once(x.shape[0])
    x = x.float()
    if columns or tokens > x.shape[0]:
        x = torch.nn.functional.pad(x, (0, columns, 0, tokens - x.shape[0]))
    return x.contiguous()


def row_slices(rows: int, columns: int) -> list[slice]:
    """The rows of a weight, a tile at a time."""
    step = max(16, TILE_WEIGHTS // columns)
    return [slice(row, min(rows, row + step)) for row in range(0, rows, step)]


def matmul(x: Tensor, rows: int, tile: Tile) -> Tensor:
    """x [tokens, columns] times the weight [rows, columns] transposed; summed in float32, in the dtype of x."""
    columns = x.float().T.contiguous()
    out = torch.empty(rows, x.shape[0], dtype=torch.float32, device=x.device)
    for some in row_slices(rows, x.shape[1]):
        torch.mm(tile(some), columns, out=out[some])
    return out.T.to(x.dtype)


def matmul_transposed(grad: Tensor, columns: int, tile: Tile) -> Tensor:
    """grad [tokens, rows] times the weight [rows, columns]; summed in float32, in the dtype of grad."""
    grads = grad.float()
    out = torch.zeros(grad.shape[0], columns, dtype=torch.float32, device=grad.device)
    for some in row_slices(grad.shape[1], columns):
        out.addmm_(grads[:, some], tile(some))
    return out.to(grad.dtype)
