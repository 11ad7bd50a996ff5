"""The rotation's mixing on the CPU, for few tokens: butterflies for the power of two, small products for odd orders.

n·log2(2^p) additions and n·(odd order) multiply–adds per token.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from torch import Tensor

from seedpack.kernels.common.jit import jit
from seedpack.kernels.common.vectors import FLOATS, I8, I32, I64, LANES, intrinsic, load, multiply_add, store
from seedpack.kernels.rotation.reference import factors, matrix, mix_factors

SMALL = 64  # an odd order up to which the compiled product is used; larger ones are left to torch


@intrinsic
def _sixteen(context: Any, address: Any) -> Any:
    """Multiply the 16 floats at an address by Sylvester's Hadamard matrix: four steps, each a swap of lanes and an addition."""

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = builder.inttoptr(args[0], I8.as_pointer())
        values = load(builder, at, FLOATS)
        for distance in (1, 2, 4, 8):
            order = ir.Constant(ir.VectorType(I32, LANES), [lane ^ distance for lane in range(LANES)])
            sign = ir.Constant(FLOATS, [-1.0 if lane & distance else 1.0 for lane in range(LANES)])
            swapped = builder.shuffle_vector(values, values, order)
            values = multiply_add(builder, values, sign, swapped)
        store(builder, values, at)
        return ctx.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _butterflies(context: Any, address: Any, distance: Any, count: Any) -> Any:
    """Multiply `count` vectors of 16 floats, so many bytes apart, by Sylvester's Hadamard matrix of that order: a tuple of 2 or
    4 elements stands for the count."""
    many = count.count

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        steps = [builder.mul(args[1], ir.Constant(I64, i)) for i in range(many)]
        places = [builder.inttoptr(builder.add(args[0], step), I8.as_pointer()) for step in steps]
        values = [load(builder, place, FLOATS) for place in places]
        half = 1
        while half < many:
            for i in range(many):
                if not i & half:
                    low, high = values[i], values[i + half]
                    values[i], values[i + half] = builder.fadd(low, high), builder.fsub(low, high)
            half *= 2
        for value, place in zip(values, places, strict=True):
            store(builder, value, place)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, count), codegen


@jit(inner=True)
def _hadamard(y: Any) -> None:
    """Multiply y, in place, by Sylvester's Hadamard matrix of ±1; its length is a power of two."""
    size, width = y.shape[0], 1
    if size >= LANES:
        for i in range(0, size, LANES):
            _sixteen(y.ctypes.data + 4 * i)
        width = LANES
        while 4 * width <= size:
            for start in range(0, size, 4 * width):
                for i in range(start, start + width, LANES):
                    _butterflies(y.ctypes.data + 4 * i, 4 * width, (0, 0, 0, 0))
            width *= 4
        if width < size:
            for i in range(0, width, LANES):
                _butterflies(y.ctypes.data + 4 * i, 4 * width, (0, 0))
        return
    while width < size:
        for start in range(0, size, 2 * width):
            for i in range(start, start + width):
                low, high = y[i], y[i + width]
                y[i], y[i + width] = low + high, low - high
        width *= 2


@jit(inner=True, fastmath=True)
def _multiply_add(y: Any, x: Any, factor: float) -> None:
    for i in range(y.shape[0]):
        y[i] += x[i] * factor


@jit(inner=True)
def mix_row(y: Any, odd: int, small: Any) -> None:
    """Multiply y, in place, by Sylvester's Hadamard matrix (of ±1) along the first axis of [2^p, odd], and, if `small` is not
    empty, by it along the second."""
    if odd == 1:
        _hadamard(y)
        return
    length = y.shape[0] // odd
    columns = np.empty((odd, length), np.float32)
    for i in range(odd):
        for j in range(length):
            columns[i, j] = y[j * odd + i]
        _hadamard(columns[i])
    mixed = columns
    if small.shape[0]:
        mixed = np.zeros((odd, length), np.float32)
        for i in range(odd):
            for j in range(odd):
                _multiply_add(mixed[i], columns[j], small[j, i])
    for i in range(odd):
        for j in range(length):
            y[j * odd + i] = mixed[i, j]


@jit(fastmath=True)
def _mix(x: Any, factor: Any, norm: Any, odd: int, small: Any, out: Any) -> None:
    """Store in out norm·(x·factor), each row mixed by `mix_row`."""
    for r in range(x.shape[0]):
        y = out[r]
        for i in range(y.shape[0]):
            y[i] = x[r, i] * factor[i] * norm
        mix_row(y, odd, small)


@lru_cache(maxsize=64)
def plan(width: int, largest: int = SMALL) -> tuple[np.float32, int, Any, list[int]]:
    """Return the norm of the powers of two, the product of the other factors, the matrix that the compiled code multiplies by
    (of an order up to `largest`), and the orders that are left to torch."""
    orders = [order for order in factors(width) if order % 2 and order != 1]
    odd = math.prod(map(abs, orders))
    compiled = len(orders) == 1 and 1 < orders[0] <= largest
    small = matrix(odd, torch.device("cpu"), torch.float32).numpy() if compiled else np.empty((0, 0), np.float32)
    return np.float32(math.sqrt(odd / width)), odd, small, [] if compiled else orders


@lru_cache(maxsize=16)
def _ones(width: int) -> Tensor:
    return torch.ones(width, dtype=torch.float32)


def mix(x: Tensor, factor: Tensor | None) -> Tensor:
    """Do as `reference.mix`, summed in another order; float32."""
    width = x.shape[-1]
    norm, odd, small, orders = plan(width)
    out = torch.empty(x.shape, dtype=torch.float32)
    factor = _ones(width) if factor is None else factor
    rows = x.float().contiguous().view(-1, width)
    _mix(rows.numpy(), factor.numpy(), norm, odd, small, out.view(-1, width).numpy())
    return mix_factors(out.view(-1, odd), orders).view(x.shape) if orders else out
