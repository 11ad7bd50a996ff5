"""The definition of SeedLM decoding, in plain torch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from seedpack._shapes import Float, Int, UInt8
from seedpack.kernels.common.bits import signed, unpack
from seedpack.kernels.seedlm.code import CODE_BITS, SeedLMCode, SeedLMParts
from seedpack.prng import lfsr_cycle, lfsr_position


@lru_cache(maxsize=8)
def tables(seed_bits: int, span: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, on a device, the position of each state (int32 [2^K]), and the centred cycle, `span` values longer (int32)."""
    cycle = torch.from_numpy(lfsr_cycle(seed_bits).copy()) - (1 << (seed_bits - 1))
    repeats = -(-span // len(cycle)) + 1
    position = torch.from_numpy(lfsr_position(seed_bits).copy())
    return position.to(device), cycle.repeat(repeats)[: len(cycle) + span].to(device)


def fields(
    seeds: UInt8[Tensor, "rows g1 b1"], codes: UInt8[Tensor, "rows g2 b2"], code: SeedLMCode, blocks: int
) -> tuple[Int[Tensor, "rows blocks"], Int[Tensor, "rows blocks"], Int[Tensor, "rows blocks rank"]]:
    """Unpack seeds (1 … 2^K - 1), exponents (-8 … 7) and mantissas (-8 … 7)."""
    width = code.rank + 1
    nibbles = signed(unpack(codes, blocks * width, CODE_BITS), CODE_BITS).unflatten(1, (blocks, width))
    return unpack(seeds, blocks, code.seed_bits), nibbles[..., 0], nibbles[..., 1:]


def decode(parts: SeedLMParts, code: SeedLMCode, columns: int, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
    """Rebuild the matrix (SeedLM, arXiv 2410.10714, Section 3 and Alg. 2).

    With V the states that follow the seed, V'[c, p] = V[c, p] - 2^(K-1), mantissas q and exponent e of a block:

        w[c] = float32(Σ_p V'[c, p]·q[p]) · float32(1 / (2^(K-1) - 1)) · 2^(e + bias)

    The sum is exact in integers (below 2^31 for K ≤ 24 and P ≤ 16); then come one conversion to float32, one
    product rounded to float32, and a product with a power of two.

    Returns:
        [rows, columns] in a dtype.
    """
    seeds, codes, exponent_bias = parts
    seed, exponent, mantissa = fields(seeds, codes, code, code.blocks(columns))
    position, cycle = tables(code.seed_bits, code.states, seeds.device)
    start = position[seed].to(torch.int64) + 1
    total = torch.zeros(*seed.shape, code.block, dtype=torch.int32, device=seeds.device)
    row = torch.arange(code.block, device=seeds.device) * code.rank
    for p in range(code.rank):
        total += cycle[start[..., None] + row + p] * mantissa[..., p, None].to(torch.int32)
    unit = torch.tensor(code.unit, dtype=torch.float32, device=seeds.device)
    power = exponent + exponent_bias.to(torch.int64)
    scale = ((power + 127) << 23).to(torch.int32).view(torch.float32)
    return (total.to(torch.float32) * unit * scale[..., None]).flatten(1)[:, :columns].to(dtype)
