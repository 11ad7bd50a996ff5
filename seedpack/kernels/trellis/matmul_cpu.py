"""The trellis's product on the CPU: a row's weights are regenerated in registers and multiplied there, a row a core.

For few tokens. For 16 weights `values16` makes, each token adds one multiply–add with its activations in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from torch import Tensor

from seedpack.kernels.common.row_tiles import padded_tokens
from seedpack.kernels.common.vectors import (
    FLOATS,
    I64,
    LANES,
    ROWS_AT_ONCE,
    data,
    intrinsic,
    load,
    multiply_add,
    splat,
    total,
)
from seedpack.kernels.trellis.decode_cpu import (
    constants,
    fill_tail,
    tail_buffer,
    values16,
    whole_groups,
)


@intrinsic
def _dots(
    context: Any, bits: Any, row: Any, mask: Any, multiplier: Any, key: Any, x: Any, first: Any, groups: Any,
    tokens: Any,
) -> Any:  # fmt: skip
    """The products of a row's groups with those of each row of x [len(tokens), 16·…], from group `first` on.

    `row` begins with the first group's bytes. Two groups at a time, each with accumulators of its own, so that sums
    of one do not wait for the other's.
    """
    count = tokens.count
    whole = types.int64
    signature = types.UniTuple(types.float32, count)(bits, row, *(types.uint32,) * 3, x, whole, whole, tokens)

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        row_at = data(ctx, builder, signature.args[1], args[1])
        array = cgutils.create_struct_proxy(signature.args[5])(ctx, builder, value=args[5])
        columns = builder.extract_value(array.shape, 1)
        sums = [[cgutils.alloca_once_value(builder, splat(FLOATS, 0.0)) for _ in range(2)] for _ in range(count)]

        def step(group: Any, side: int) -> None:
            values = values16(builder, row_at, group, bits.count, *args[2:5])
            at = builder.mul(builder.add(group, args[6]), ir.Constant(I64, LANES))
            for t in range(count):
                place = builder.add(builder.mul(ir.Constant(I64, t), columns), at)
                activations = load(builder, builder.gep(array.data, [place]), FLOATS)
                builder.store(multiply_add(builder, values, activations, builder.load(sums[t][side])), sums[t][side])

        even = builder.and_(args[7], ir.Constant(I64, -2))
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), even, ir.Constant(I64, 2), I64) as (group, _):
            step(group, 0)
            step(builder.add(group, ir.Constant(I64, 1)), 1)
        with cgutils.for_range_slice(builder, even, args[7], ir.Constant(I64, 1), I64) as (group, _):
            step(group, 0)
        found = [total(builder, builder.fadd(builder.load(one), builder.load(other))) for one, other in sums]
        return ctx.make_tuple(builder, signature.return_type, found)

    return signature, codegen


@njit(parallel=True, cache=True, nogil=True)
def _matmul(
    bits: Any,
    stream: Any,
    mask: Any,
    multiplier: Any,
    key: Any,
    circular: Any,
    scale: Any,
    x: Any,
    tokens: Any,
    out: Any,
) -> None:
    rows, groups = stream.shape[0], x.shape[1] // LANES
    inside = min(groups, whole_groups(stream.shape[1], len(bits)))
    for chunk in prange(-(-rows // ROWS_AT_ONCE)):
        last = tail_buffer(stream.shape[1], inside, len(bits))
        for r in range(chunk * ROWS_AT_ONCE, min(rows, (chunk + 1) * ROWS_AT_ONCE)):
            found = _dots(bits, stream[r], mask, multiplier, key, x, 0, inside, tokens)
            fill_tail(last, stream[r], inside, len(bits), circular)
            rest = _dots(bits, last, mask, multiplier, key, x, inside, groups - inside, tokens)
            for t in range(len(tokens)):
                out[t, r] = (found[t] + rest[t]) * scale[r]


def matmul(
    x: Tensor, stream: Tensor, scale: Tensor, code_bits: int, state_bits: int, key: int, circular: bool
) -> Tensor:
    """As `reference.matmul`, summed in another order; at most 8 tokens."""
    padded = padded_tokens(x, -x.shape[1] % LANES)
    out = torch.empty(len(padded), stream.shape[0], dtype=torch.float32)
    bits, mask, multiplier, c = constants(code_bits, state_bits, key)
    rows = stream.contiguous().flatten(1).numpy()
    _matmul(
        bits,
        rows,
        mask,
        multiplier,
        c,
        circular,
        scale.contiguous().numpy(),
        padded.numpy(),
        (0,) * len(padded),
        out.numpy(),
    )
    return out[: len(x)].to(x.dtype)
