"""A random rotation of a weight's input side: signs, then a Kronecker product of small orthogonal matrices."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from seedpack.prng import rademacher

LARGEST_FACTOR = 1024
POWER_OF_TWO = 64


def factors(width: int) -> list[int]:
    """Return the orders of the factors, whose product is the width: powers of two up to 64, then odd orders.

    A prime factor above 1024 stands as its negative: the blocks along it are not mixed.

    >>> factors(4096), factors(576), factors(27)
    ([64, 64], [64, 9], [27])
    """
    out, rest = [], width
    while rest % 2 == 0:
        order = min(rest & -rest, POWER_OF_TWO)
        out.append(order)
        rest //= order
    if rest <= LARGEST_FACTOR:
        return out + [rest] * (rest > 1 or not out)
    prime = 3
    while rest > 1:
        if rest % prime == 0:
            out.append(prime)
            rest //= prime
        elif prime * prime > rest:
            prime = rest
        else:
            prime += 2
    return [order if order <= LARGEST_FACTOR else -order for order in out]


@lru_cache(maxsize=64)
def matrix(order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a symmetric orthogonal matrix: Sylvester's Hadamard matrix for a power of two, else the discrete Hartley
    transform cas(2π·i·j / n) / √n (Bracewell, 1983), whose entries are nearly as even."""
    index = torch.arange(order, dtype=torch.int64)
    product = index[:, None] * index
    if order & (order - 1) == 0:
        ones = torch.zeros_like(product)
        both = index[:, None] & index
        for bit in range(order.bit_length()):
            ones ^= both >> bit & 1
        out = (1 - 2 * ones).to(torch.float64)
    else:
        angle = (product % order).to(torch.float64) * (2 * math.pi / order)
        out = angle.cos() + angle.sin()
    return (out / math.sqrt(order)).to(device, dtype)


@lru_cache(maxsize=64)
def signs(seed: int, width: int, device: torch.device) -> Tensor:
    """Return the ±1 of a seed, float32 [width]."""
    return rademacher(seed, 1, width, device=device)[0]


def mix_factors(x: Tensor, orders: list[int]) -> Tensor:
    """Multiply x [..., n] by the Kronecker product of the matrices of some orders, whose product is n."""
    rows = x.numel() // max(1, x.shape[-1])
    y = x
    for order in orders:  # the first axis is mixed and becomes the last; after all they stand as before
        y = y.reshape(rows, abs(order), x.shape[-1] // abs(order)).mT
        y = y @ matrix(order, x.device, x.dtype) if order > 0 else y
    return y.reshape(x.shape)


def mix(x: Tensor, factor: Tensor | None = None) -> Tensor:
    """Return (x·diag(factor)) K for x [..., n]; float64 stays so, else float32."""
    return mix_factors(_working(x if factor is None else x * factor), factors(x.shape[-1]))


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rotate(x: Tensor, seed: int) -> Tensor:
    """Multiply x [..., n] by the rotation: n·(64 + 64 + … + odd order) multiply-adds per row. float64 stays so, else float32."""
    return mix(_working(x) * signs(seed, x.shape[-1], x.device))


def unrotate(x: Tensor, seed: int) -> Tensor:
    """Undo `rotate`."""
    return mix(x) * signs(seed, x.shape[-1], x.device)
