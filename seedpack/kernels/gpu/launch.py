"""Launching the kernels of `tiles` for a regenerated weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from seedpack.kernels.gpu import configs, tiles
from seedpack.kernels.tiles import FEW_TOKENS, padded_tokens


@dataclass(frozen=True)
class Regenerated:
    """A weight [rows, columns] that a TILE function regenerates; see `tiles`.

    Attributes:
        tile: the function.
        parts: its pointers and numbers.
        sizes: its constants.
        scale: float32 [rows], or [1] for all rows.
        rows: of the weight.
        columns: of the weight.
        heavy: whether a tile takes many registers.
        dense_share: of the places of a tile, those that are columns of the weight: (numerator, denominator).
    """

    tile: Any
    parts: tuple[Any, ...]
    sizes: tuple[int, ...]
    scale: Tensor
    rows: int
    columns: int
    dense_share: tuple[int, int] = (1, 1)
    heavy: bool = False

    def step(self, block_k: int) -> int:
        """Columns that BLOCK_K places of a tile cover."""
        return block_k * self.dense_share[0] // self.dense_share[1]

    @property
    def stride_scale(self) -> int:
        """Between the scales of neighbouring rows."""
        return int(self.scale.numel() > 1)


def dense(weight: Regenerated, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
    """The weight, or those of its rows that `index` [n] names, in a dtype."""
    rows = weight.rows if index is None else index.numel()
    out = torch.empty(rows, weight.columns, dtype=dtype, device=weight.scale.device)
    block = configs.DENSE
    grid = (triton.cdiv(rows, block["BLOCK_N"]), triton.cdiv(weight.columns, weight.step(block["BLOCK_K"])))
    if rows:
        tiles.dense_kernel[grid](
            out, weight.scale if index is None else index, weight.scale, weight.parts, rows, weight.columns,
            weight.stride_scale, INDEXED=index is not None, TILE=weight.tile, SIZES=weight.sizes, **block,
        )  # fmt: skip
    return out


def matmul(x: Tensor, weight: Regenerated, dtype: torch.dtype) -> Tensor:
    """x [tokens, columns] times the weight transposed, in a dtype, which also says how exact the product must be.

    Few tokens multiply in float32. For many, 16-bit dtypes allow float16 on tensor cores, each token of x scaled to its
    largest value; float32 is kept exact.
    """
    if x.shape[0] <= FEW_TOKENS:
        return few_tokens(x, weight, dtype)
    operand, x_scale = tensor_core_operand(x, dtype)
    out = torch.empty(x.shape[0], weight.rows, dtype=dtype, device=x.device)
    block = configs.matmul(operand, weight.heavy)
    grid = (triton.cdiv(x.shape[0], block["BLOCK_M"]), triton.cdiv(weight.rows, block["BLOCK_N"]))
    tiles.matmul_kernel[grid](
        operand, x_scale, out, weight.scale, weight.parts, x.shape[0], weight.rows, weight.columns,
        weight.stride_scale, TILE=weight.tile, SIZES=weight.sizes, STEP=weight.step(block["BLOCK_K"]),
        PRECISION=configs.precision(x.device), **block,
    )  # fmt: skip
    return out


def few_tokens(x: Tensor, weight: Regenerated, dtype: torch.dtype) -> Tensor:
    """`matmul` for at most 8 tokens."""
    padded = padded_tokens(x, 0)
    out = torch.empty(len(padded), weight.rows, dtype=dtype, device=x.device)
    block = configs.FEW_TOKENS
    tiles.few_tokens_kernel[(triton.cdiv(weight.rows, block["BLOCK_N"]),)](
        padded, out, weight.scale, weight.parts, weight.rows, weight.columns, weight.stride_scale,
        TOKENS=len(padded), TILE=weight.tile, SIZES=weight.sizes, STEP=weight.step(block["BLOCK_K"]), **block,
    )  # fmt: skip
    return out[: len(x)]


def matmul_transposed(grad: Tensor, weight: Regenerated, dtype: torch.dtype) -> Tensor:
    """grad [tokens, rows] times the weight, in a dtype; exact as `matmul` is."""
    operand, grad_scale = tensor_core_operand(grad.float() * weight.scale, dtype)
    out = torch.empty(grad.shape[0], weight.columns, dtype=dtype, device=grad.device)
    block = configs.matmul(operand, weight.heavy)
    grid = (triton.cdiv(grad.shape[0], block["BLOCK_M"]), triton.cdiv(weight.columns, weight.step(block["BLOCK_K"])))
    if grad.shape[0]:
        tiles.transposed_kernel[grid](
            operand, grad_scale, out, weight.parts, grad.shape[0], weight.rows, weight.columns,
            TILE=weight.tile, SIZES=weight.sizes, PRECISION=configs.precision(grad.device), **block,
        )  # fmt: skip
    return out


def tensor_core_operand(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the tensor cores take for x [tokens, n], and the factor of each token: float16 in ±1, or float32 as it is."""
    x = x.float()
    if dtype == torch.float32:
        return x.contiguous(), torch.ones(x.shape[0], device=x.device)
    scale = x.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale[:, None]).half().contiguous(), scale
