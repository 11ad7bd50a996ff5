"""SeedLM's product on the CPU: for few tokens 16 blocks of a row are regenerated in registers and multiplied there; for
more, tiles are decoded and multiplied by torch.

Activations are laid out like the blocks in the lanes. To the work of decoding each token adds one multiply–add for 16
weights, and one for 16 blocks' scales.
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
    intrinsic,
    load,
    multiply_add,
    splat,
    total,
)
from seedpack.kernels.seedlm.code import SeedLMCode, SeedLMParts
from seedpack.kernels.seedlm.decode_cpu import blocks16, constants, decode, tail_buffer, whole_groups


@intrinsic
def _dots(
    context: Any,
    bits: Any,
    block: Any,
    rank: Any,
    seeds: Any,
    codes: Any,
    bias: Any,
    x: Any,
    first: Any,
    groups: Any,
    tokens: Any,
) -> Any:
    """Multiply a row's groups of blocks with those of each row of x [len(tokens), groups, C, 16], from `first` on.

    Not yet times the unit. `seeds` and `codes` begin with the first group's bytes.
    """
    count = tokens.count
    whole = types.int64
    signature = types.UniTuple(types.float32, count)(
        bits, block, rank, seeds, codes, types.int32, x, whole, whole, tokens
    )

    def codegen(ctx: Any, builder: Any, signature: Any, args: Any) -> Any:
        seeds_at, codes_at, x_at = (data(ctx, builder, signature.args[i], args[i]) for i in (3, 4, 6))
        array = cgutils.create_struct_proxy(signature.args[6])(ctx, builder, value=args[6])
        width = ir.Constant(I64, block.count * LANES)
        row = builder.mul(builder.extract_value(array.shape, 1), width)
        sums = [cgutils.alloca_once_value(builder, splat(FLOATS, 0.0)) for _ in range(count)]
        with cgutils.for_range(builder, args[8], intp=I64) as loop:
            sizes = (bits.count, block.count, rank.count)
            totals, scale = blocks16(builder, seeds_at, codes_at, loop.index, args[5], *sizes)
            weights = [builder.sitofp(value, FLOATS) for value in totals]
            at = builder.mul(builder.add(loop.index, args[7]), width)
            for t in range(count):
                product = splat(FLOATS, 0.0)
                for c, weight in enumerate(weights):
                    place = builder.add(
                        at, builder.add(builder.mul(row, ir.Constant(I64, t)), ir.Constant(I64, LANES * c))
                    )
                    product = multiply_add(builder, weight, load(builder, builder.gep(x_at, [place]), FLOATS), product)
                builder.store(multiply_add(builder, product, scale, builder.load(sums[t])), sums[t])
        return ctx.make_tuple(builder, signature.return_type, [total(builder, builder.load(s)) for s in sums])

    return signature, codegen


@jit(parallel=True)
def _matmul(
    bits: Any, block: Any, rank: Any, seeds: Any, codes: Any, bias: Any, unit: Any, x: Any, tokens: Any, out: Any
) -> None:
    groups = x.shape[1]
    seed_bytes, code_bytes = 2 * len(bits), 8 * (len(rank) + 1)
    inside = min(groups, whole_groups(seeds.shape[1], seed_bytes), whole_groups(codes.shape[1], code_bytes))
    rows = seeds.shape[0]
    rest_seeds, rest_codes = seeds.shape[1] - inside * seed_bytes, codes.shape[1] - inside * code_bytes
    for chunk in prange(-(-rows // ROWS_AT_ONCE)):
        last_seeds, last_codes = tail_buffer(rest_seeds, seed_bytes), tail_buffer(rest_codes, code_bytes)
        for r in range(chunk * ROWS_AT_ONCE, min(rows, (chunk + 1) * ROWS_AT_ONCE)):
            last_seeds[:rest_seeds] = seeds[r, inside * seed_bytes :]
            last_codes[:rest_codes] = codes[r, inside * code_bytes :]
            dots = _dots(bits, block, rank, seeds[r], codes[r], bias, x, 0, inside, tokens)
            last_dots = _dots(bits, block, rank, last_seeds, last_codes, bias, x, inside, groups - inside, tokens)
            for t in range(len(tokens)):
                out[t, r] = (dots[t] + last_dots[t]) * unit


def matmul(x: Tensor, parts: SeedLMParts, code: SeedLMCode) -> Tensor:
    """Do as `matmul_reference.matmul`, summed in another order."""
    tokens, columns = x.shape
    if tokens > row_tiles.FEW_TOKENS:
        return row_tiles.matmul(x, len(parts.seeds), _tile(parts, code, columns))
    padded = row_tiles.pad_tokens(x, -columns % (code.block * LANES))
    lanes = padded.view(len(padded), -1, LANES, code.block).transpose(2, 3).contiguous()
    (k, c, p), bias, unit = constants(code, parts.exponent_bias)
    out = torch.empty(len(padded), len(parts.seeds), dtype=torch.float32)
    seeds, codes = (part.contiguous().flatten(1).numpy() for part in parts[:2])
    _matmul(k, c, p, seeds, codes, bias, unit, lanes.numpy(), (0,) * len(padded), out.numpy())
    return out[:tokens].to(x.dtype)


def matmul_transposed(grad: Tensor, parts: SeedLMParts, code: SeedLMCode, columns: int) -> Tensor:
    """Do as `matmul_reference.matmul_transposed`, summed in another order."""
    return row_tiles.matmul_transposed(grad, columns, _tile(parts, code, columns))


def _tile(parts: SeedLMParts, code: SeedLMCode, columns: int) -> row_tiles.Tile:
    return lambda rows: decode(parts.rows(rows), code, columns, torch.float32)
