"""Pad tokens to the counts that code is compiled for, and multiply by a weight that is rebuilt some rows at a time, so that
no more than a tile of it is ever dense."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache

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


def row_slices(rows: int, columns: int, weights: int = TILE_WEIGHTS) -> list[slice]:
    """Return the rows of a weight, a tile of so many weights at a time."""
    step = max(16, weights // columns)
    return [slice(row, min(rows, row + step)) for row in range(0, rows, step)]


@cache
def bfloat16_is_faster() -> bool:
    """Return whether the processor multiplies matrices of bfloat16 faster than of float32: with AMX, or on AMD's with AVX-512's
    instruction for it, which on Intel's takes twice as long as a multiply–add of float32."""
    has: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    is_amd = any(name in str(has.get("cpu_name")) for name in ("AMD", "EPYC", "Ryzen"))
    return bool(has.get("amx_bf16") or (is_amd and has.get("avx512_bf16")))


def matmul(x: Tensor, rows: int, tile: Tile, dtype: torch.dtype | None = None) -> Tensor:
    """Multiply x [tokens, columns] by the weight [rows, columns] transposed, in a dtype, by default that of x; summed in float32.

    Factors are float32, or for a result of bfloat16 bfloat16 where that is faster.
    """
    dtype = dtype or x.dtype
    of_factors = dtype if dtype == torch.bfloat16 and x.is_cpu and bfloat16_is_faster() else torch.float32
    columns = x.to(of_factors).T.contiguous()
    out = torch.empty(rows, x.shape[0], dtype=of_factors, device=x.device)
    for part in row_slices(rows, x.shape[1]):
        torch.mm(tile(part).to(of_factors), columns, out=out[part])
    return out.T.to(dtype)


def matmul_transposed(grad: Tensor, columns: int, tile: Tile) -> Tensor:
    """Multiply grad [tokens, rows] by the weight [rows, columns]; summed in float32, in the dtype of grad."""
    grads = grad.float()
    out = torch.zeros(grad.shape[0], columns, dtype=torch.float32, device=grad.device)
    for part in row_slices(grad.shape[1], columns):
        out.addmm_(grads[:, part], tile(part))
    return out.to(grad.dtype)
