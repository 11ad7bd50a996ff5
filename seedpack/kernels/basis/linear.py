"""Multiply by a weight of bases as a torch operator, differentiable in the activations and the coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seedpack.kernels.basis import NoiseBasis, noise_basis


@torch.library.custom_op("seedpack::basis_linear", mutates_args=())
def _linear(x: Tensor, coefs: Tensor, generator: str, seed: int, key: str, rows: int) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        y = noise_basis(generator, seed, key).matmul(x.reshape(-1, x.shape[-1]), coefs, rows)
    return y.view(*x.shape[:-1], rows)


@_linear.register_fake
def _(x: Tensor, coefs: Tensor, generator: str, seed: int, key: str, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("seedpack::basis_linear_backward", mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, coefs: Tensor, generator: str, seed: int, key: str, to_x: bool, to_coefs: bool
) -> tuple[Tensor, Tensor]:
    grads, tokens = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    basis = noise_basis(generator, seed, key)
    grad_x, grad_coefs = x.new_empty(0), coefs.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        if to_x:
            grad_x = basis.matmul_transposed(grads, coefs, x.shape[-1]).view(x.shape)
        if to_coefs:
            grad_coefs = basis.grad_coefs(grads, tokens, *coefs.shape)
    return grad_x, grad_coefs.to(coefs.dtype)


@_gradients.register_fake
def _(
    grad: Tensor, x: Tensor, coefs: Tensor, generator: str, seed: int, key: str, to_x: bool, to_coefs: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if to_x else 0), coefs.new_empty(coefs.shape if to_coefs else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, coefs, *ctx.basis, _ = inputs
    ctx.save_for_backward(x, coefs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, coefs = ctx.saved_tensors
    to_x, to_coefs = ctx.needs_input_grad[:2]
    grad_x, grad_coefs = _gradients(grad, x, coefs, *ctx.basis, to_x, to_coefs)
    return grad_x if to_x else None, grad_coefs if to_coefs else None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_setup_context)


def basis_linear(x: Tensor, coefs: Tensor, basis: NoiseBasis, *, rows: int) -> Tensor:
    """Multiply x [..., columns] by the weight [rows, columns] transposed, in the dtype of x; see `NoiseBasis.matmul`.

    The noise is generated again in the backward pass; no dense weight, nor its gradient, is ever kept.

    Args:
        x: activations.
        coefs: [blocks, M].
        basis: with a seed below 2^63 (an operator's argument is a signed integer).
        rows: of the weight.
    """
    return _linear(x, coefs, basis.generator, basis.seed, basis.key, rows)  # type: ignore[no-any-return]
