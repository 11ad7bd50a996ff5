"""Rebuild a weight of bases as a torch operator, differentiable in its coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seedpack.kernels.basis import NoiseBasis, noise_basis


@torch.library.custom_op("seedpack::basis_weight", mutates_args=())
def _weight(
    coefs: Tensor, generator: str, seed: int, key: str, rows: int, columns: int, index: Tensor | None
) -> Tensor:
    # not in autocast's dtype: weights are what a file holds, whatever products are made in
    with torch.autocast(coefs.device.type, enabled=False):
        return noise_basis(generator, seed, key).dense(coefs, rows, columns, index)


@_weight.register_fake
def _(coefs: Tensor, generator: str, seed: int, key: str, rows: int, columns: int, index: Tensor | None) -> Tensor:
    return coefs.new_empty((rows if index is None else index.shape[0], columns), dtype=torch.float32)


@torch.library.custom_op("seedpack::basis_weight_backward", mutates_args=())
def _gradient(
    grad: Tensor, blocks: int, count: int, generator: str, seed: int, key: str, rows: int, index: Tensor | None
) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        return noise_basis(generator, seed, key).reduce(grad, blocks, count, rows, index).contiguous()


@_gradient.register_fake
def _(
    grad: Tensor, blocks: int, count: int, generator: str, seed: int, key: str, rows: int, index: Tensor | None
) -> Tensor:
    return grad.new_empty((blocks, count), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    coefs, *ctx.basis, ctx.rows, _, index = inputs
    ctx.shape, ctx.dtype = coefs.shape, coefs.dtype
    ctx.save_for_backward(index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradient = _gradient(grad, *ctx.shape, *ctx.basis, ctx.rows, *ctx.saved_tensors)
    return gradient.to(ctx.dtype), None, None, None, None, None, None


_weight.register_autograd(_backward, setup_context=_setup_context)


def basis_weight(coefs: Tensor, basis: NoiseBasis, *, rows: int, columns: int, index: Tensor | None = None) -> Tensor:
    """Return the weight float32 [rows, columns] of coefficients [blocks, M], or some of its rows, see `NoiseBasis.dense`;
    nothing but the index is kept for the backward pass.

    Args:
        coefs: [blocks, M].
        basis: with a seed below 2^63 (an operator's argument is a signed integer).
        rows: of the weight.
        columns: of the weight.
        index: int64 [n], the rows to make; None is all.
    """
    return _weight(coefs, basis.generator, basis.seed, basis.key, rows, columns, index)  # type: ignore[no-any-return]
