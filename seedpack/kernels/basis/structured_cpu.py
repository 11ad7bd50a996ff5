"""Structured bases on the CPU: a piece's butterflies in the L2 cache, pieces shared among the cores.

K·log2 K additions for each of the two transforms of a piece of K weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seedpack.kernels.common.jit import jit


@jit()
def _transform(y: Any) -> None:
    """Multiply y by Sylvester's Hadamard matrix, not normalised; its size a power of two from 16 on."""
    size = y.shape[0]
    for i in range(0, size, 8):
        a0, a1, a2, a3 = y[i] + y[i + 1], y[i] - y[i + 1], y[i + 2] + y[i + 3], y[i + 2] - y[i + 3]
        a4, a5, a6, a7 = y[i + 4] + y[i + 5], y[i + 4] - y[i + 5], y[i + 6] + y[i + 7], y[i + 6] - y[i + 7]
        b0, b1, b2, b3 = a0 + a2, a1 + a3, a0 - a2, a1 - a3
        b4, b5, b6, b7 = a4 + a6, a5 + a7, a4 - a6, a5 - a7
        y[i], y[i + 1], y[i + 2], y[i + 3] = b0 + b4, b1 + b5, b2 + b6, b3 + b7
        y[i + 4], y[i + 5], y[i + 6], y[i + 7] = b0 - b4, b1 - b5, b2 - b6, b3 - b7
    width = 8
    while 4 * width <= size:
        for start in range(0, size, 4 * width):
            p, q = y[start : start + width], y[start + width : start + 2 * width]
            r, s = y[start + 2 * width : start + 3 * width], y[start + 3 * width : start + 4 * width]
            for i in range(width):
                a, b, c, d = p[i] + q[i], p[i] - q[i], r[i] + s[i], r[i] - s[i]
                p[i], q[i], r[i], s[i] = a + c, b + d, a - c, b - d
        width *= 4
    if width < size:
        p, q = y[:width], y[width:]
        for i in range(width):
            p[i], q[i] = p[i] + q[i], p[i] - q[i]


@jit()
def _transform_twice(y: Any, between: Any) -> None:
    """Transform, multiply by signs, transform."""
    _transform(y)
    for i in range(y.shape[0]):
        y[i] *= np.float32(between[i])
    _transform(y)


@jit(parallel=True)
def _expand(coefs: Any, signs: Any, norm: Any, out: Any) -> None:
    blocks, pieces, width = out.shape
    for n in prange(blocks * pieces):
        b, p = n // pieces, n % pieces
        y, first, second = out[b, p], signs[0, b, p], signs[1, b, p]
        for i in range(width):
            y[i] = coefs[b, i] * np.float32(first[i]) * norm
        _transform_twice(y, second)


@jit(parallel=True)
def _reduce(weight_grad: Any, signs: Any, norm: Any, out: Any) -> None:
    blocks, pieces, width = weight_grad.shape
    for n in prange(blocks * pieces):
        b, p = n // pieces, n % pieces
        y, first, second = out[b, p], signs[0, b, p], signs[1, b, p]
        for i in range(width):
            y[i] = weight_grad[b, p, i] * norm
        _transform_twice(y, second)
        for i in range(width):
            y[i] *= np.float32(first[i])


def expand(coefs: Tensor, signs: Tensor) -> Tensor:
    """Do as `structured_reference.expand`, summed in another order; signs int8."""
    out = torch.empty(signs.shape[1:], dtype=torch.float32)
    _expand(coefs.contiguous().numpy(), signs.numpy(), _norm(signs), out.numpy())
    return out


def reduce(weight_grad: Tensor, signs: Tensor) -> Tensor:
    """Do as `structured_reference.reduce`, summed in another order; signs int8."""
    out = torch.empty(signs.shape[1:], dtype=torch.float32)
    _reduce(weight_grad.contiguous().numpy(), signs.numpy(), _norm(signs), out.numpy())
    return out.sum(1)


def _norm(signs: Tensor) -> np.float32:
    return np.float32(signs.shape[-1] ** -0.5)  # √K over K, for two matrices that are not normalised
