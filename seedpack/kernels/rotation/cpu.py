"""The rotation's mixing on the CPU, for few tokens: butterflies for the power of two, small products for odd orders.

n·log2(2^p) additions and n·(odd order) multiply–adds a token.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from seedpack.kernels.rotation.reference import factors, matrix, mix_factors

SMALL = 64  # an odd order up to which the compiled product is used; larger ones are left to torch


@njit(cache=True, nogil=True, fastmath=True)
def _butterflies(rows: Any, odd: int) -> None:
    """Each row times Sylvester's Hadamard matrix along the first axis of [2^p, odd], not normalised."""
    for r in range(rows.shape[0]):
        y = rows[r]
        width = odd
        while width < y.shape[0]:
            for start in range(0, y.shape[0], 2 * width):
                low, high = y[start : start + width], y[start + width : start + 2 * width]
                for i in range(width):
                    a, b = low[i], high[i]
                    low[i], high[i] = a + b, a - b
            width *= 2


@njit(cache=True, nogil=True, fastmath=True)
def _small_products(segments: Any, symmetric: Any) -> None:
    """Each segment times a small symmetric matrix."""
    order = symmetric.shape[0]
    out = np.empty(order, np.float32)
    for s in range(segments.shape[0]):
        out[:] = 0
        for j in range(order):
            value = segments[s, j]
            for i in range(order):
                out[i] += value * symmetric[j, i]
        segments[s] = out


@lru_cache(maxsize=64)
def _odd_orders(width: int) -> tuple[list[int], int]:
    """The factors that are no powers of two, and their product."""
    orders = [order for order in factors(width) if order % 2 and order != 1]
    return orders, math.prod(map(abs, orders))


@lru_cache(maxsize=64)
def _small(order: int) -> Any:
    return matrix(order, torch.device("cpu"), torch.float32).numpy()


def mix(x: Tensor, factor: Tensor | None) -> Tensor:
    """As `reference.mix(x·factor)`, summed in another order; float32."""
    width = x.shape[-1]
    orders, odd = _odd_orders(width)
    norm = math.sqrt(odd / width)
    y = x.float().contiguous() * (norm if factor is None else factor * norm)
    _butterflies(y.view(-1, width).numpy(), odd)
    if len(orders) == 1 and 1 < orders[0] <= SMALL:
        _small_products(y.view(-1, odd).numpy(), _small(odd))
        return y
    return mix_factors(y.view(-1, odd), orders).view(x.shape) if odd > 1 else y
