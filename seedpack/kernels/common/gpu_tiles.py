"""Decode and multiply any weight that is regenerated tile by tile, in Triton.

A codec gives a function TILE(parts, i_row, step, SIZES, BLOCK_K) -> (i_column [BLOCK_K], b_weight [BLOCK_N, BLOCK_K]):
the columns of a step along the input, and float32 weights there. `parts` is a tuple of pointers and numbers, SIZES one of
constants. Columns beyond the weight's, where its geometry has such, are at least `columns`; what a tile holds there is
finite. Of a tile's places SHARE = (numerator, denominator) are columns of the weight: so many a step of BLOCK_K covers.

Rows have a scale in float32 by which sums are multiplied, so that a tile's values fit float16 (the trellis's integers
exactly); `stride_scale` 0 is one scale for all.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dense_kernel(
    out_ptr, scale_ptr, parts, first, rows, columns, stride_scale,
    TILE: tl.constexpr, SIZES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store out [rows, columns]: the weight's rows from `first` on times their scales."""
    i_out = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_out = i_out < rows
    i_row = first + tl.where(m_out, i_out, 0)
    i_column, b_weight = TILE(parts, i_row, tl.program_id(1), SIZES, BLOCK_K)
    b_weight *= tl.load(scale_ptr + i_row * stride_scale)[:, None]
    p_out = out_ptr + i_out[:, None] * columns + i_column[None, :]
    tl.store(p_out, b_weight.to(out_ptr.dtype.element_ty), m_out[:, None] & (i_column < columns)[None, :])


@triton.jit
def few_tokens_kernel(
    x_ptr, out_ptr, scale_ptr, parts, rows, columns, stride_scale,
    TOKENS: tl.constexpr, TILE: tl.constexpr, SIZES: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store out [TOKENS, rows] = x [TOKENS, columns] · weight.T by multiply–adds; x is float32."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = i_row < rows
    i_row = tl.where(m_row, i_row, 0)
    i_token = tl.arange(0, TOKENS)
    b_sum = tl.zeros((BLOCK_N, BLOCK_K, TOKENS), tl.float32)
    for step in range(tl.cdiv(columns, BLOCK_K * SHARE[0] // SHARE[1])):
        i_column, b_weight = TILE(parts, i_row, step, SIZES, BLOCK_K)
        p_x = x_ptr + i_token[None, :] * columns + i_column[:, None]
        b_x = tl.load(p_x, (i_column < columns)[:, None], other=0.0)
        b_sum += b_weight[:, :, None] * b_x[None, :, :]
    b_out = tl.sum(b_sum, 1) * tl.load(scale_ptr + i_row * stride_scale)[:, None]
    p_out = out_ptr + i_token[None, :] * tl.cast(rows, tl.int64) + i_row[:, None]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), m_row[:, None])


@triton.jit
def matmul_kernel(
    x_ptr, x_scale_ptr, out_ptr, scale_ptr, parts, tokens, rows, columns, stride_scale,
    TILE: tl.constexpr, SIZES: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr, BUCKET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store out [tokens, rows] = x_scale [tokens] · x [tokens, columns] · weight.T on tensor cores, in the dtype of x.

    The weight is the left operand: what was regenerated in registers stays there.
    """
    i_token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_row = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_token, m_row = i_token < tokens, i_row < rows
    i_row = tl.where(m_row, i_row, 0)
    b_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(tl.cdiv(columns, BLOCK_K * SHARE[0] // SHARE[1])):
        i_column, b_weight = TILE(parts, i_row, step, SIZES, BLOCK_K)
        p_x = x_ptr + i_token[None, :].to(tl.int64) * columns + i_column[:, None]
        b_x = tl.load(p_x, (i_column < columns)[:, None] & m_token[None, :], other=0.0)
        b_sum = tl.dot(b_weight.to(b_x.dtype), b_x, b_sum, input_precision=PRECISION)
    b_sum *= tl.load(scale_ptr + i_row * stride_scale)[:, None]
    b_sum *= tl.load(x_scale_ptr + i_token, m_token, other=0.0)[None, :]
    p_out = out_ptr + i_token[None, :].to(tl.int64) * rows + i_row[:, None]
    tl.store(p_out, b_sum.to(out_ptr.dtype.element_ty), m_token[None, :] & m_row[:, None])


@triton.jit
def transposed_kernel(
    grad_ptr, grad_scale_ptr, out_ptr, parts, tokens, rows, columns,
    TILE: tl.constexpr, SIZES: tl.constexpr, PRECISION: tl.constexpr, BUCKET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store out [tokens, columns] = grad_scale [tokens] · grad [tokens, rows] · weight; rows' scales are in grad already."""
    i_token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_token = i_token < tokens
    b_sum = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    i_column = tl.arange(0, BLOCK_K)
    for block in range(tl.cdiv(rows, BLOCK_N)):
        i_row = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_row = i_row < rows
        i_column, b_weight = TILE(parts, tl.where(m_row, i_row, 0), tl.program_id(1), SIZES, BLOCK_K)
        p_grad = grad_ptr + i_token[:, None].to(tl.int64) * rows + i_row[None, :]
        b_grad = tl.load(p_grad, m_token[:, None] & m_row[None, :], other=0.0)
        b_sum = tl.dot(b_grad, b_weight.to(b_grad.dtype), b_sum, input_precision=PRECISION)
    b_sum *= tl.load(grad_scale_ptr + i_token, m_token, other=0.0)[:, None]
    p_out = out_ptr + i_token[:, None].to(tl.int64) * columns + i_column[None, :]
    tl.store(p_out, b_sum.to(out_ptr.dtype.element_ty), m_token[:, None] & (i_column < columns)[None, :])
