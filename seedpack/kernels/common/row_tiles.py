"""Pad tokens to the counts that code is compiled for, and multiply by a weight that is rebuilt some rows at a time, so that
no more than a tile of it is ever dense."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

TILE_WEIGHTS = 1 << 21  # float32 of a tile: 8 MB, measured best; smaller ones change between thread pools too often
FEW_TOKENS = 8  # up to so many the weights are regenerated inside the product, beyond it tile by tile
TOKEN_COUNTS = (1, 2, 4, 8)  # tokens of one pass over the weights; code is compiled for each


class Product(ABC):
    """A prepared product of few tokens, at most `most_tokens`."""

    most_tokens: int

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor | None:
        """Return the product of x [..., columns]; None once the parts have other bytes."""


Tile = Callable[[slice], Tensor]  # from a slice of rows to the weight there, float32 [rows, columns]


def padded_token_count(tokens: int) -> int:
    """Return the least of `TOKEN_COUNTS` that holds so many tokens."""
    return next(count for count in TOKEN_COUNTS if count >= tokens)


def pad_tokens(x: Tensor, columns: int) -> Tensor:
    """Return x [tokens, n] in float32 with zeros for further columns, and for further tokens up to the next count."""
    tokens = padded_token_count(x.shape[0])
    x = x.float()
    if columns or tokens > x.shape[0]:
        x = torch.nn.functional.pad(x, (0, columns, 0, tokens - x.shape[0]))
    return x.contiguous()


def row_slices(rows: int, columns: int) -> list[slice]:
    """Return the rows of a weight, a tile at a time."""
    step = max(16, TILE_WEIGHTS // columns)
    return [slice(row, min(rows, row + step)) for row in range(0, rows, step)]


def matmul(x: Tensor, rows: int, tile: Tile) -> Tensor:
    """Multiply x [tokens, columns] by the weight [rows, columns] transposed; summed in float32, in the dtype of x."""
    columns = x.float().T.contiguous()
    out = torch.empty(rows, x.shape[0], dtype=torch.float32, device=x.device)
    for part in row_slices(rows, x.shape[1]):
        torch.mm(tile(part), columns, out=out[part])
    return out.T.to(x.dtype)


def matmul_transposed(grad: Tensor, columns: int, tile: Tile) -> Tensor:
    """Multiply grad [tokens, rows] by the weight [rows, columns]; summed in float32, in the dtype of grad."""
    grads = grad.float()
    out = torch.zeros(grad.shape[0], columns, dtype=torch.float32, device=grad.device)
    for part in row_slices(grad.shape[1], columns):
        out.addmm_(grads[:, part], tile(part))
    return out.to(grad.dtype)
