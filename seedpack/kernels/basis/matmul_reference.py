"""The definition of products with a weight of noise, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack._shapes import Float, Int
from seedpack.kernels.basis.decode_reference import dense, noise_of_rows, row_slices
from seedpack.kernels.basis.dense_noise import DenseNoise
from seedpack.kernels.basis.noise_basis import rows_per_block


def matmul(
    x: Float[Tensor, "tokens columns"], coefs: Float[Tensor, "blocks count"], basis: DenseNoise, rows: int
) -> Float[Tensor, "tokens rows"]:
    """Multiply x by the weight transposed; summed in float32, in the dtype of x."""
    return (x.float() @ _dense(coefs, basis, rows, x.shape[1]).T).to(x.dtype)


def matmul_transposed(
    grad: Float[Tensor, "tokens rows"], coefs: Float[Tensor, "blocks count"], basis: DenseNoise, columns: int
) -> Float[Tensor, "tokens columns"]:
    """Multiply grad by the weight: the gradient of `matmul` to x; summed in float32, in the dtype of grad."""
    return (grad.float() @ _dense(coefs, basis, grad.shape[1], columns)).to(grad.dtype)


def grad_coefs(
    grad: Float[Tensor, "tokens rows"], x: Float[Tensor, "tokens columns"], blocks: int, count: int, basis: DenseNoise
) -> Float[Tensor, "blocks count"]:
    """Return the gradient of `matmul` to the coefficients, float32: `reduce` of the weight's gradient."""
    rows = grad.shape[1]
    return reduce(grad.float().T @ x.float(), blocks, count, basis, rows, torch.arange(rows, device=x.device))


def reduce(
    weight_grad: Float[Tensor, "n columns"],
    blocks: int,
    count: int,
    basis: DenseNoise,
    rows: int,
    index: Int[Tensor, " n"],
) -> Float[Tensor, "blocks count"]:
    """Transpose `dense`: return, float32, Σ over a block's weights of noise times what the weight has, as a gradient."""
    block = index // rows_per_block(rows, blocks)
    out = torch.zeros(blocks, count, dtype=torch.float32, device=weight_grad.device)
    for part in row_slices(index, weight_grad.shape[1] * count):
        values = noise_of_rows(index[part], weight_grad.shape[1], count, basis)
        out.index_add_(0, block[part], (weight_grad[part, None].float() @ values)[:, 0])
    return out


def _dense(coefs: Tensor, basis: DenseNoise, rows: int, columns: int) -> Tensor:
    return dense(coefs, basis, rows, columns, torch.arange(rows, device=coefs.device))
