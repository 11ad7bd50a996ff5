"""The rotation's mixing in Triton, for few tokens: all factors in one launch, one program per token.

Each factor is a product with a small matrix along one axis, from one buffer into another; what a program writes it alone
reads again, behind a barrier.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from seedpack.kernels.common import gpu_configs as configs
from seedpack.kernels.rotation.reference import factors, matrix

LEAST = 16  # the least side of a product on tensor cores


@triton.jit
def mix_kernel(
    x_ptr, factor_ptr, out_ptr, scratch_ptr, matrices, n, out_n,
    ORDERS: tl.constexpr, AFTER: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, PER: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store out [tokens, out_n] = (x·factor) K in float32; ORDERS and AFTER: each factor's order, and the product of those behind.

    In each GROUP of the result the first of every PER stand together, then the second, and so on. scratch [2, tokens, n].
    """
    i_start = tl.program_id(0).to(tl.int64) * n
    other = tl.num_programs(0).to(tl.int64) * n  # from one scratch to the other
    for f in tl.static_range(len(ORDERS)):
        i_side = tl.arange(0, PADDED[f])
        m_side = i_side < ORDERS[f]
        p_matrix = matrices[f] + i_side[:, None] * ORDERS[f] + i_side[None, :]
        b_matrix = tl.load(p_matrix, m_side[:, None] & m_side[None, :], other=0.0)
        for first in range(0, n // ORDERS[f], BLOCK):
            i_rest = first + tl.arange(0, BLOCK)
            m = m_side[:, None] & (i_rest < n // ORDERS[f])[None, :]
            i = (i_rest // AFTER[f] * (ORDERS[f] * AFTER[f]) + i_rest % AFTER[f])[None, :] + i_side[:, None] * AFTER[f]
            if f == 0:
                b = tl.load(x_ptr + i_start + i, m, other=0.0).to(tl.float32) * tl.load(factor_ptr + i, m, other=0.0)
            else:
                b = tl.load(scratch_ptr + (f - 1) % 2 * other + i_start + i, m, other=0.0)
            b = tl.dot(b_matrix, b, input_precision=PRECISION)
            if f == len(ORDERS) - 1:
                i_out = i // GROUP * GROUP + i % PER * (GROUP // PER) + i % GROUP // PER
                tl.store(out_ptr + tl.program_id(0).to(tl.int64) * out_n + i_out, b, m)
            else:
                tl.store(scratch_ptr + f % 2 * other + i_start + i, b, m)
        tl.debug_barrier()


@lru_cache(maxsize=64)
def _steps(width: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the order of each factor that is mixed, the product of the factors behind it, and the order rounded to a power of two."""
    orders = factors(width)
    behind = [math.prod(map(abs, orders[i + 1 :])) for i in range(len(orders))]
    mixed = [(order, after) for order, after in zip(orders, behind, strict=True) if order > 1] or [(1, 1)]
    return (
        tuple(order for order, _ in mixed),
        tuple(after for _, after in mixed),
        tuple(max(LEAST, triton.next_power_of_2(order)) for order, _ in mixed),
    )


def mix(x: Tensor, factor: Tensor | None) -> Tensor:
    """Do as `reference.mix`, summed in another order; float32."""
    return mix_lanes(x, factor, torch.empty(x.shape, dtype=torch.float32, device=x.device), 1, 1)


def mix_lanes(x: Tensor, factor: Tensor | None, out: Tensor, group: int, per: int) -> Tensor:
    """Mix into out [tokens at least, n at least], float32, groups reordered as `mix_kernel` says; returns it."""
    x, n = x.contiguous(), x.shape[-1]
    factor = torch.ones(n, dtype=torch.float32, device=x.device) if factor is None else factor.contiguous()
    orders, after, padded = _steps(n)
    if not x.numel():
        return out
    matrices = tuple(matrix(order, x.device, torch.float32) for order in orders)
    tokens = x.numel() // n
    scratch = torch.empty(2, tokens, n if len(orders) > 1 else 0, dtype=torch.float32, device=x.device)
    constants = {"ORDERS": orders, "AFTER": after, "PADDED": padded, "GROUP": group, "PER": per}
    constants["PRECISION"] = configs.precision(x.device)
    with configs.current(x.device):
        mix_kernel[(tokens,)](x, factor, out, scratch, matrices, n, out.shape[-1], **constants, **configs.MIX)
    return out
