"""The trellis's product on the CPU: for few tokens a row's weights are regenerated in registers and multiplied there, rows
shared among the cores; for more, tiles are decoded and multiplied by torch.

For each vector that `window_values` makes, each token adds one multiply–add with its activations in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from torch import Tensor

from seedpack.kernels.common import row_tiles
from seedpack.kernels.common.jit import jit
from seedpack.kernels.common.vectors import (
    FLOATS,
    I64,
    LANES,
    ROWS_AT_ONCE,
    data,
    interleaved,
    intrinsic,
    load,
    multiply_add,
    splat,
    total,
)
from seedpack.kernels.dispatch import Backend
from seedpack.kernels.rotation import mix
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode_cpu import constants, dense, fill_tail, tail_buffer, whole_groups, window_values
from seedpack.kernels.trellis.matmul_reference import rounded


@intrinsic
def _dots(
    context: Any, bits: Any, per_window: Any, row: Any, mask: Any, a: Any, c: Any, x: Any, first: Any, groups: Any, tokens: Any
) -> Any:  # fmt: skip
    """Multiply a row's groups with those of each row of x [len(tokens), 16·V·…], from group `first` on.

    `row` begins with the first group's bytes. Two groups at a time, each with accumulators of its own, so that sums
    of one do not wait for the other's.
    """
    count = tokens.count
    whole = types.int64
    signature = types.UniTuple(types.float32, count)(
        bits, per_window, row, *(types.uint32,) * 3, x, whole, whole, tokens
    )

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        row_at = data(ctx, builder, signature.args[2], args[2])
        array = cgutils.create_struct_proxy(signature.args[6])(ctx, builder, value=args[6])
        columns = builder.extract_value(array.shape, 1)
        sums = [[cgutils.alloca_once_value(builder, splat(FLOATS, 0.0)) for _ in range(2)] for _ in range(count)]

        def step(group: Any, side: int) -> None:
            values = window_values(builder, row_at, group, bits.count, per_window.count, *args[3:6])
            at = builder.mul(builder.add(group, args[7]), ir.Constant(I64, LANES * per_window.count))
            for i, vector in enumerate(interleaved(builder, values)):
                for t in range(count):
                    place = builder.add(builder.mul(ir.Constant(I64, t), columns), at)
                    place = builder.add(place, ir.Constant(I64, i * LANES))
                    activations = load(builder, builder.gep(array.data, [place]), FLOATS)
                    to = sums[t][side]
                    builder.store(multiply_add(builder, vector, activations, builder.load(to)), to)

        even = builder.and_(args[8], ir.Constant(I64, -2))
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), even, ir.Constant(I64, 2), I64) as (group, _):
            step(group, 0)
            step(builder.add(group, ir.Constant(I64, 1)), 1)
        with cgutils.for_range_slice(builder, even, args[8], ir.Constant(I64, 1), I64) as (group, _):
            step(group, 0)
        dots = [total(builder, builder.fadd(builder.load(one), builder.load(other))) for one, other in sums]
        return ctx.make_tuple(builder, signature.return_type, dots)

    return signature, codegen


@jit(parallel=True)
def _matmul(
    bits: Any, per_window: Any, stream: Any, mask: Any, a: Any, c: Any, tail_biting: Any, scale: Any, x: Any, tokens: Any, out: Any
) -> None:  # fmt: skip
    rows, groups = stream.shape[0], x.shape[1] // (LANES * len(per_window))
    inside = min(groups, whole_groups(stream.shape[1], len(bits)))
    for chunk in prange(-(-rows // ROWS_AT_ONCE)):
        tail = tail_buffer(stream.shape[1], inside, len(bits))
        for r in range(chunk * ROWS_AT_ONCE, min(rows, (chunk + 1) * ROWS_AT_ONCE)):
            dots = _dots(bits, per_window, stream[r], mask, a, c, x, 0, inside, tokens)
            fill_tail(tail, stream[r], inside, len(bits), tail_biting)
            tail_dots = _dots(bits, per_window, tail, mask, a, c, x, inside, groups - inside, tokens)
            for t in range(len(tokens)):
                out[t, r] = (dots[t] + tail_dots[t]) * scale[r]


def matmul(x: Tensor, stream: Tensor, scale: Tensor, code: TrellisCode, dtype: torch.dtype, int8: bool) -> Tensor:
    """Do as `matmul_reference.matmul`, summed in another order."""
    x = rounded(x, code.weights) if int8 else x
    if len(x) > row_tiles.FEW_TOKENS:
        return row_tiles.matmul(x, len(scale), _tile(stream, scale, code, x.shape[1]), dtype)
    padded = row_tiles.pad_tokens(x, -x.shape[1] % (LANES * code.weights))
    out = torch.empty(len(padded), stream.shape[0], dtype=torch.float32)
    bits, per_window, mask, a, c = constants(code)
    rows, scales = stream.contiguous().flatten(1).numpy(), scale.contiguous().numpy()
    tokens = (0,) * len(padded)
    _matmul(bits, per_window, rows, mask, a, c, code.tail_biting, scales, padded.numpy(), tokens, out.numpy())
    return out[: len(x)].to(dtype)


def linear(
    x: Tensor, factor: Tensor, stream: Tensor, scale: Tensor, code: TrellisCode, int8: bool, backend: Backend
) -> Tensor:
    """Do as `matmul_reference.linear`."""
    return matmul(mix(x, factor, backend), stream, scale, code, x.dtype, int8)


def matmul_transposed(
    grad: Tensor, stream: Tensor, scale: Tensor, code: TrellisCode, columns: int, dtype: torch.dtype
) -> Tensor:
    """Do as `matmul_reference.matmul_transposed`, summed in another order."""
    return row_tiles.matmul_transposed(grad, columns, _tile(stream, scale, code, columns)).to(dtype)


def _tile(stream: Tensor, scale: Tensor, code: TrellisCode, columns: int) -> row_tiles.Tile:
    return lambda rows: dense(stream[rows], scale[rows], code, columns)
