"""The rotation's mixing on the CPU, for few tokens: butterflies for the power of two, small products for odd orders.

n·log2(2^p) additions and n·(odd order) multiply–adds per token.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seedpack.kernels.common.jit import jit
from seedpack.kernels.rotation.reference import factors, matrix, mix_factors

SMALL = 64  # an odd order up to which the compiled product is used; larger ones are left to torch


@jit(fastmath=True)
def _mix(x: Any, factor: Any, norm: Any, odd: int, small: Any, out: Any) -> None:
    """Store in out norm·(x·factor) times Sylvester's Hadamard matrix along the first axis of [2^p, odd], and, if `small` is not
    empty, times it along the second."""
    order = small.shape[0]
    segment = np.empty(order, np.float32)
    for r in range(x.shape[0]):
        y = out[r]
        for i in range(y.shape[0]):
            y[i] = x[r, i] * factor[i] * norm
        width = odd
        while width < y.shape[0]:
            for start in range(0, y.shape[0], 2 * width):
                low, high = y[start : start + width], y[start + width : start + 2 * width]
                for i in range(width):
                    a, b = low[i], high[i]
                    low[i], high[i] = a + b, a - b
            width *= 2
        if order:
            for start in range(0, y.shape[0], order):
                segment[:] = 0
                for j in range(order):
                    value = y[start + j]
                    for i in range(order):
                        segment[i] += value * small[j, i]
                y[start : start + order] = segment


@lru_cache(maxsize=64)
def _plan(width: int) -> tuple[np.float32, int, Any, list[int]]:
    """Return the norm of the powers of two, the product of the other factors, the matrix that the compiled code multiplies by,
    and the orders that are left to torch."""
    orders = [order for order in factors(width) if order % 2 and order != 1]
    odd = math.prod(map(abs, orders))
    compiled = len(orders) == 1 and 1 < orders[0] <= SMALL
    small = matrix(odd, torch.device("cpu"), torch.float32).numpy() if compiled else np.empty((0, 0), np.float32)
    return np.float32(math.sqrt(odd / width)), odd, small, [] if compiled else orders


@lru_cache(maxsize=16)
def _ones(width: int) -> Tensor:
    return torch.ones(width, dtype=torch.float32)


def mix(x: Tensor, factor: Tensor | None) -> Tensor:
    """Do as `reference.mix`, summed in another order; float32."""
    width = x.shape[-1]
    norm, odd, small, orders = _plan(width)
    out = torch.empty(x.shape, dtype=torch.float32)
    factor = _ones(width) if factor is None else factor
    rows = x.float().contiguous().view(-1, width)
    _mix(rows.numpy(), factor.numpy(), norm, odd, small, out.view(-1, width).numpy())
    return mix_factors(out.view(-1, odd), orders).view(x.shape) if orders else out
