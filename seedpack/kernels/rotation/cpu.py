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
from seedpack.kernels.common.memory import array
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
def _hadamard(at: int, size: int) -> None:
    """Multiply the floats at an address, in place, by Sylvester's Hadamard matrix of ±1; their count is a power of two."""
    width = 1
    if size >= LANES:
        for i in range(0, size, LANES):
            _sixteen(at + 4 * i)
        width = LANES
        while 4 * width <= size:
            for start in range(0, size, 4 * width):
                for i in range(start, start + width, LANES):
                    _butterflies(at + 4 * i, 4 * width, (0, 0, 0, 0))
            width *= 4
        if width < size:
            for i in range(0, width, LANES):
                _butterflies(at + 4 * i, 4 * width, (0, 0))
        return
    y = array(at, np.float32, size)
    while width < size:
        for start in range(0, size, 2 * width):
            for i in range(start, start + width):
                low, high = y[i], y[i + width]
                y[i], y[i + width] = low + high, low - high
        width *= 2


@jit(inner=True, fastmath=True)
def _multiply_add(to: int, source: int, factor: float, size: int) -> None:
    y, x = array(to, np.float32, size), array(source, np.float32, size)
    for i in range(size):
        y[i] += x[i] * factor


@jit(inner=True)
def mix_row(at: int, width: int, odd: int, small: int, order: int, work: int) -> None:
    """Multiply the row of floats at an address, in place, by Sylvester's Hadamard matrix (of ±1) along the first axis of
    [2^p, odd], and, if `order` is not 0, by the matrix at `small` of that order along the second; `work` are 2·width floats."""
    if odd == 1:
        _hadamard(at, width)
        return
    length = width // odd
    y, columns = array(at, np.float32, width), array(work, np.float32, width)
    for i in range(odd):
        for j in range(length):
            columns[i * length + j] = y[j * odd + i]
        _hadamard(work + 4 * i * length, length)
    mixed = work
    if order:
        mixed = work + 4 * width
        matrix, sums = array(small, np.float32, odd * odd), array(mixed, np.float32, width)
        for i in range(width):
            sums[i] = 0
        for i in range(odd):
            for j in range(odd):
                _multiply_add(mixed + 4 * i * length, work + 4 * j * length, matrix[j * odd + i], length)
    found = array(mixed, np.float32, width)
    for i in range(odd):
        for j in range(length):
            y[j * odd + i] = found[i * length + j]


@jit(fastmath=True)
def _mix(
    x: int, rows: int, width: int, factor: int, norm: Any, odd: int, small: int, order: int, work: int, out: int
) -> None:
    """Store in out norm·(x·factor), each row mixed by `mix_row`; all are addresses of floats."""
    factors = array(factor, np.float32, width)
    for r in range(rows):
        values, y = array(x + 4 * r * width, np.float32, width), array(out + 4 * r * width, np.float32, width)
        for i in range(width):
            y[i] = values[i] * factors[i] * norm
        mix_row(out + 4 * r * width, width, odd, small, order, work)


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
    rows, factor = x.float().contiguous(), factor.float().contiguous()
    work = torch.empty(2 * width, dtype=torch.float32)
    _mix(
        rows.data_ptr(), rows.numel() // width, width, factor.data_ptr(), norm, odd, small.ctypes.data, len(small),
        work.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return mix_factors(out.view(-1, odd), orders).view(x.shape) if orders else out
