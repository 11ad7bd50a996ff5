"""Products with weights of noise in Triton: `gpu_tiles`, and a kernel of its own for the gradient to the coefficients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seedpack.kernels.basis.decode_reference import SQUIRREL_STRIDE
from seedpack.kernels.basis.decode_triton import four_numbers, key_of, regenerated
from seedpack.kernels.basis.dense_noise import DenseNoise
from seedpack.kernels.basis.noise_basis import rows_per_block
from seedpack.kernels.common import gpu_configs as configs
from seedpack.kernels.common import gpu_launch as launch


@triton.jit
def grad_coefs_kernel(
    grad_ptr, x_ptr, out_ptr, tokens, rows, columns, blocks_of_columns, key, groups,
    PHILOX: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store out [parts, rows, 4·groups] = for each row Σ over a part of the columns of noise·(gradᵀ·x); all float32.

    The weight's gradient is made a tile at a time in registers; each program adds to rows of `out` that are its own.
    """
    i_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = i_row < rows
    p_out = out_ptr + (tl.program_id(1).to(tl.int64) * rows + i_row) * (4 * groups)
    for block in range(blocks_of_columns):
        i_column = (tl.program_id(1) * blocks_of_columns + block) * BLOCK_K + tl.arange(0, BLOCK_K)
        m_column = i_column < columns
        b_weight_grad = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for first in range(0, tokens, BLOCK_M):
            i_token = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
            m_token = i_token < tokens
            p_grad = grad_ptr + i_token[None, :] * rows + i_row[:, None]
            b_grad = tl.load(p_grad, m_row[:, None] & m_token[None, :], other=0.0)
            p_x = x_ptr + i_token[:, None] * columns + i_column[None, :]
            b_x = tl.load(p_x, m_token[:, None] & m_column[None, :], other=0.0)
            b_weight_grad = tl.dot(b_grad, b_x, b_weight_grad, input_precision=PRECISION)
        i_weight = i_row.to(tl.int64)[:, None] * columns + i_column[None, :]
        for group in range(groups):
            n0, n1, n2, n3 = four_numbers(i_weight, tl.cast(group, tl.int32), key, PHILOX, STRIDE)
            p = p_out + 4 * group
            tl.store(p, tl.load(p, m_row, other=0.0) + tl.sum(n0 * b_weight_grad, 1), m_row)
            tl.store(p + 1, tl.load(p + 1, m_row, other=0.0) + tl.sum(n1 * b_weight_grad, 1), m_row)
            tl.store(p + 2, tl.load(p + 2, m_row, other=0.0) + tl.sum(n2 * b_weight_grad, 1), m_row)
            tl.store(p + 3, tl.load(p + 3, m_row, other=0.0) + tl.sum(n3 * b_weight_grad, 1), m_row)
        tl.debug_barrier()


def matmul(x: Tensor, coefs: Tensor, basis: DenseNoise, rows: int) -> Tensor:
    """Do as `matmul_reference.matmul`, summed in another order, and in float16 on tensor cores for many tokens of 16 bits."""
    return launch.matmul(x, regenerated(coefs, basis, rows, x.shape[1]), x.dtype)


def matmul_transposed(grad: Tensor, coefs: Tensor, basis: DenseNoise, columns: int) -> Tensor:
    """Do as `matmul_reference.matmul_transposed`, exact as `matmul` is."""
    return launch.matmul_transposed(grad, regenerated(coefs, basis, grad.shape[1], columns), grad.dtype)


def grad_coefs(grad: Tensor, x: Tensor, blocks: int, count: int, basis: DenseNoise) -> Tensor:
    """Do as `matmul_reference.grad_coefs`, summed in another order."""
    rows, columns = grad.shape[1], x.shape[1]
    config, groups = configs.GRAD_COEFS, triton.cdiv(count, 4)
    tiles = triton.cdiv(columns, config["BLOCK_K"])
    per_part = triton.cdiv(tiles, configs.GRAD_PARTS)
    parts = triton.cdiv(tiles, per_part)
    out = torch.zeros(parts, rows, 4 * groups, dtype=torch.float32, device=x.device)
    grid = triton.cdiv(rows, config["BLOCK_N"]), parts
    args = grad.float().contiguous(), x.float().contiguous(), out, len(grad), rows, columns, per_part
    constants = {"PHILOX": basis.philox, "STRIDE": SQUIRREL_STRIDE, "PRECISION": configs.precision(x.device)}
    with configs.current(x.device):
        grad_coefs_kernel[grid](*args, key_of(basis), groups, **constants, **config)
    block = torch.arange(rows, device=x.device) // rows_per_block(rows, blocks)
    zeros = torch.zeros(blocks, count, dtype=torch.float32, device=x.device)
    return zeros.index_add_(0, block, out.sum(0)[:, :count])


def reduce(weight_grad: Tensor, blocks: int, count: int, basis: DenseNoise, rows: int, index: Tensor) -> Tensor:
    """Do as `matmul_reference.reduce` for all rows, summed in another order: by a product whose tokens are the rows."""
    return grad_coefs(
        torch.eye(rows, dtype=torch.float32, device=weight_grad.device), weight_grad, blocks, count, basis
    )
