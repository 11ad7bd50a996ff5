"""Fast feedforward in Triton: a program walks down with one token and multiplies it with its leaf alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seedpack.kernels.common import gpu_configs as configs
from seedpack.kernels.feedforward.reference import Tree

WARPS = 4


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """Apply relu, gelu or silu; NaN stays NaN."""
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    if ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    return x / (1 + tl.exp(-x))


@triton.jit
def forward_kernel(
    x_ptr, nodes_ptr, node_bias_ptr, leaf_in_ptr, in_bias_ptr, leaf_out_ptr, out_bias_ptr, out_ptr, columns, outputs, width,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store out [tokens, outputs] = the leaf of x [tokens, columns]; sums in float32. WIDTH: width to a power of two."""
    i_token = tl.program_id(0).to(tl.int64)
    i_block = tl.arange(0, BLOCK)
    node = i_token * 0
    for _ in range(DEPTH):
        b_sum = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, columns, BLOCK):
            m = first + i_block < columns
            b_x = tl.load(x_ptr + i_token * columns + first + i_block, m, other=0.0).to(tl.float32)
            b_row = tl.load(nodes_ptr + node * columns + first + i_block, m, other=0.0).to(tl.float32)
            b_sum += b_x * b_row
        score = tl.sum(b_sum) + tl.load(node_bias_ptr + node).to(tl.float32)
        node = 2 * node + 1 + (score > 0)
    leaf = node - ((1 << DEPTH) - 1)

    i_unit = tl.arange(0, WIDTH)
    m_unit = i_unit < width
    i_row = leaf * width + i_unit
    b_sums = tl.zeros((WIDTH, BLOCK), tl.float32)
    for first in range(0, columns, BLOCK):
        m = first + i_block < columns
        b_x = tl.load(x_ptr + i_token * columns + first + i_block, m, other=0.0).to(tl.float32)
        p_rows = leaf_in_ptr + i_row[:, None] * columns + (first + i_block)[None, :]
        b_sums += tl.load(p_rows, m_unit[:, None] & m[None, :], other=0.0).to(tl.float32) * b_x[None, :]
    b_bias = tl.load(in_bias_ptr + i_row, m_unit, other=0.0).to(tl.float32)
    b_hidden = tl.where(m_unit, activated(tl.sum(b_sums, 1) + b_bias, ACTIVATION), 0.0)
    for first in range(0, outputs, BLOCK):
        m = first + i_block < outputs
        p_rows = leaf_out_ptr + i_row[:, None] * outputs + (first + i_block)[None, :]
        b_rows = tl.load(p_rows, m_unit[:, None] & m[None, :], other=0.0).to(tl.float32)
        b_out = tl.load(out_bias_ptr + leaf * outputs + first + i_block, m, other=0.0).to(tl.float32)
        b_out += tl.sum(b_rows * b_hidden[:, None], 0)
        tl.store(out_ptr + i_token * outputs + first + i_block, b_out, m)


def forward(x: Tensor, tree: Tree, activation: str) -> Tensor:
    """Do as `reference.forward`, summed in another order and in float32."""
    values = [x.detach(), *(value.detach() for value in tree)]  # type: ignore[union-attr]
    width = tree.in_bias.shape[1]
    out = torch.empty(len(x), tree.out_bias.shape[1], dtype=x.dtype, device=x.device)
    if not len(x):
        return out
    padded = triton.next_power_of_2(width)
    args = *(value.contiguous() for value in values), out, x.shape[1], out.shape[1], width
    constants = {"DEPTH": tree.depth, "WIDTH": padded, "ACTIVATION": activation}
    block = max(16, min(512, 8192 // padded))
    with configs.current(x.device):
        forward_kernel[(len(x),)](*args, **constants, BLOCK=block, num_warps=WARPS)
    return out
