"""A weight of bases as a torch operator, differentiable in its coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seedpack.kernels.basis.decode import basis_dense, basis_reduce


@torch.library.custom_op("seedpack::basis_weight", mutates_args=())
def _weight(
    coefs: Tensor, seed: int, generator: str, rows: int, columns: int, key: str, index: Tensor | None
) -> Tensor:
    with torch.autocast(
        coefs.device.type, enabled=False
    ):  # weights are what a file holds, whatever products are made in
        return basis_dense(coefs, seed=seed, generator=generator, rows=rows, columns=columns, key=key, index=index)


@_weight.register_fake
def _(coefs: Tensor, seed: int, generator: str, rows: int, columns: int, key: str, index: Tensor | None) -> Tensor:
    return coefs.new_empty((rows if index is None else index.shape[0], columns), dtype=torch.float32)


@torch.library.custom_op("seedpack::basis_weight_backward", mutates_args=())
def _gradient(
    grad: Tensor, blocks: int, count: int, seed: int, generator: str, rows: int, key: str, index: Tensor | None
) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        return basis_reduce(
            grad, blocks=blocks, count=count, seed=seed, generator=generator, rows=rows, key=key, index=index
        ).contiguous()


@_gradient.register_fake
def _(
    grad: Tensor, blocks: int, count: int, seed: int, generator: str, rows: int, key: str, index: Tensor | None
) -> Tensor:
    return grad.new_empty((blocks, count), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    coefs, ctx.seed, ctx.generator, ctx.rows, _, ctx.key, index = inputs
    ctx.shape, ctx.dtype = coefs.shape, coefs.dtype
    ctx.save_for_backward(index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradient = _gradient(grad, *ctx.shape, ctx.seed, ctx.generator, ctx.rows, ctx.key, *ctx.saved_tensors)
    return gradient.to(ctx.dtype), None, None, None, None, None, None


_weight.register_autograd(_backward, setup_context=_setup_context)


def basis_weight(
    coefs: Tensor, *, seed: int, generator: str, rows: int, columns: int, key: str = "", index: Tensor | None = None
) -> Tensor:
    """The weight float32 [rows, columns] of coefficients [blocks, M], or some of its rows, as `basis_dense` makes it;
    nothing but the index is kept for the backward pass.

    Args:
        coefs: [blocks, M].
        seed: of the bases, below 2^63 (an operator's argument is a signed integer).
        generator: "philox", "squirrel5" or "hadamard".
        rows: of the weight.
        columns: of the weight.
        key: the check of a private key, or "".
        index: int64 [n], the rows to make; None is all.
    """
    return _weight(coefs, seed, generator, rows, columns, key, index)  # type: ignore[no-any-return]
