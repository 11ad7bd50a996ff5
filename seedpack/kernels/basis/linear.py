"""The product with a basis weight as a torch operator, differentiable in the activations and the coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seedpack.kernels.basis.matmul import basis_grad_coefs, basis_matmul, basis_matmul_transposed


@torch.library.custom_op("seedpack::basis_linear", mutates_args=())
def _linear(x: Tensor, coefs: Tensor, seed: int, generator: str, rows: int) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        y = basis_matmul(x.reshape(-1, x.shape[-1]), coefs, seed=seed, generator=generator, rows=rows)
    return y.view(*x.shape[:-1], rows)


@_linear.register_fake
def _(x: Tensor, coefs: Tensor, seed: int, generator: str, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("seedpack::basis_linear_backward", mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, coefs: Tensor, seed: int, generator: str, to_x: bool, to_coefs: bool
) -> tuple[Tensor, Tensor]:
    grads, given = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    noise: dict[str, Any] = {"seed": seed, "generator": generator}
    grad_x, grad_coefs = x.new_empty(0), coefs.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        if to_x:
            grad_x = basis_matmul_transposed(grads, coefs, columns=x.shape[-1], **noise).view(x.shape)
        if to_coefs:
            grad_coefs = basis_grad_coefs(grads, given, blocks=coefs.shape[0], count=coefs.shape[1], **noise)
    return grad_x, grad_coefs.to(coefs.dtype)


@_gradients.register_fake
def _(
    grad: Tensor, x: Tensor, coefs: Tensor, seed: int, generator: str, to_x: bool, to_coefs: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if to_x else 0), coefs.new_empty(coefs.shape if to_coefs else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, coefs, ctx.seed, ctx.generator, _ = inputs
    ctx.save_for_backward(x, coefs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, coefs = ctx.saved_tensors
    to_x, to_coefs = ctx.needs_input_grad[:2]
    grad_x, grad_coefs = _gradients(grad, x, coefs, ctx.seed, ctx.generator, to_x, to_coefs)
    return grad_x if to_x else None, grad_coefs if to_coefs else None, None, None, None


_linear.register_autograd(_backward, setup_context=_setup_context)


def basis_linear(x: Tensor, coefs: Tensor, *, seed: int, generator: str, rows: int) -> Tensor:
    """x [..., columns] times the weight [rows, columns] transposed, in the dtype of x; see `basis_decode.reference`.

    The noise is generated again in the backward pass; no dense weight, nor its gradient, is ever kept.

    Args:
        x: activations.
        coefs: [blocks, M].
        seed: of the noise, below 2^63 (an operator's argument is a signed integer).
        generator: "philox" or "squirrel5".
        rows: of the weight.
    """
    return _linear(x, coefs, seed, generator, rows)  # type: ignore[no-any-return]
