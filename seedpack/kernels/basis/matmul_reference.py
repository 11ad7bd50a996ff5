"""The definition of products with a basis weight, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack._shapes import Float
from seedpack.kernels.basis.decode_reference import dense, reduce


def matmul(
    x: Float[Tensor, "tokens columns"], coefs: Float[Tensor, "blocks count"], seed: int, generator: str, rows: int
) -> Float[Tensor, "tokens rows"]:
    """x times the weight transposed; summed in float32, in the dtype of x."""
    return (x.float() @ _dense(coefs, seed, generator, rows, x.shape[1]).T).to(x.dtype)


def matmul_transposed(
    grad: Float[Tensor, "tokens rows"], coefs: Float[Tensor, "blocks count"], seed: int, generator: str, columns: int
) -> Float[Tensor, "tokens columns"]:
    """grad times the weight: the gradient of `matmul` to x; summed in float32, in the dtype of grad."""
    return (grad.float() @ _dense(coefs, seed, generator, grad.shape[1], columns)).to(grad.dtype)


def grad_coefs(
    grad: Float[Tensor, "tokens rows"],
    x: Float[Tensor, "tokens columns"],
    blocks: int,
    count: int,
    seed: int,
    generator: str,
) -> Float[Tensor, "blocks count"]:
    """The gradient of `matmul` to the coefficients, float32: Σ over a block's weights of noise times the weight's gradient."""
    rows = grad.shape[1]
    weight_grad = grad.float().T @ x.float()
    return reduce(weight_grad, blocks, count, seed, generator, rows, torch.arange(rows, device=x.device))


def _dense(coefs: Tensor, seed: int, generator: str, rows: int, columns: int) -> Tensor:
    return dense(coefs, seed, generator, rows, columns, torch.arange(rows, device=coefs.device))
