"""SeedLM's weights in Triton: a tile from the seeds and codes of its blocks.

A block's states are windows of one bit sequence that begins with its seed; the register's rule (M21 of docs/format.md)
grows it in a 64-bit integer. A block of C weights takes the next power of two of places in a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seedpack.kernels.common import gpu_launch as launch
from seedpack.kernels.common.gpu_launch import Regenerated
from seedpack.kernels.seedlm.code import SeedLMCode, SeedLMParts
from seedpack.prng import LFSR_TAPS


@triton.jit
def _field(p_row, first, size, BITS: tl.constexpr):
    """Load the BITS bits (at most 24) from bit `first` on of rows of `size` bytes, int32; bytes beyond a row are 0."""
    byte = first >> 3
    value = tl.load(p_row + byte, byte < size, other=0).to(tl.int32)
    for i in tl.static_range(1, 4):
        if i * 8 < BITS + 7:
            value |= tl.load(p_row + (byte + i), byte + i < size, other=0).to(tl.int32) << (8 * i)
    return (value >> (first & 7)) & ((1 << BITS) - 1)


@triton.jit
def seedlm_tile(parts, i_row, step, SIZES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Make a tile, see `gpu_tiles`; parts = seeds, codes, bytes of a row of each, columns, 1 / (2^(K-1) - 1);
    SIZES = K, C, P, places of a block, bits that one step grows, the taps as a mask."""
    seeds_ptr, codes_ptr, seed_bytes, code_bytes, columns, unit = parts
    SEED_BITS: tl.constexpr = SIZES[0]
    BLOCK: tl.constexpr = SIZES[1]
    RANK: tl.constexpr = SIZES[2]
    PLACES: tl.constexpr = SIZES[3]
    GROWN: tl.constexpr = SIZES[4]
    MASK: tl.constexpr = (1 << SEED_BITS) - 1
    CODES: tl.constexpr = 4 * (RANK + 1)
    i_block = step * (BLOCK_K // PLACES) + tl.arange(0, BLOCK_K // PLACES)[None, :]
    sequence = _field(seeds_ptr + i_row[:, None] * seed_bytes, i_block * SEED_BITS, seed_bytes, SEED_BITS).to(tl.uint64)
    for start in tl.static_range(0, BLOCK * RANK, GROWN):
        new = tl.zeros_like(sequence)
        for tap in tl.static_range(SEED_BITS):
            if (SIZES[5] >> tap) & 1:
                new ^= sequence >> (start + tap)
        sequence |= (new & ((1 << GROWN) - 1)) << (start + SEED_BITS)
    codes = _field(codes_ptr + i_row[:, None] * code_bytes, i_block * CODES, code_bytes, CODES)
    i_weight = tl.arange(0, PLACES)[None, None, :]
    total = tl.zeros((i_row.shape[0], BLOCK_K // PLACES, PLACES), tl.int32)
    for p in tl.static_range(RANK):
        mantissa = (((codes >> (4 * (p + 1))) & 15) ^ 8) - 8
        shift = tl.where(i_weight < BLOCK, i_weight * RANK + (p + 1), 0).to(tl.uint64)
        state = ((sequence[:, :, None] >> shift) & MASK).to(tl.int32) - (1 << (SEED_BITS - 1))
        total += state * mantissa[:, :, None]
    power = ((((codes & 15) ^ 8) - 8 + 127) << 23).to(tl.float32, bitcast=True)
    b_weight = total.to(tl.float32) * unit * power[:, :, None]
    i_place = step * BLOCK_K + tl.arange(0, BLOCK_K)
    i_column = tl.where(i_place % PLACES < BLOCK, i_place // PLACES * BLOCK + i_place % PLACES, columns)
    return i_column, tl.reshape(b_weight, (i_row.shape[0], BLOCK_K))


def regenerated(parts: SeedLMParts, code: SeedLMCode, columns: int) -> Regenerated:
    """Return a SeedLM weight for the kernels of `gpu_tiles`."""
    seeds, codes, bias = parts.seeds.contiguous().flatten(1), parts.codes.contiguous().flatten(1), parts.exponent_bias
    places = triton.next_power_of_2(code.block)
    taps = LFSR_TAPS[code.seed_bits]
    scale = torch.ldexp(torch.ones(1, dtype=torch.float32, device=bias.device), bias.float())
    pointers = (seeds, codes, seeds.shape[1], codes.shape[1], columns, code.unit)
    sizes = (code.seed_bits, code.block, code.rank, places, code.seed_bits - max(taps), sum(1 << tap for tap in taps))
    return Regenerated(seedlm_tile, pointers, sizes, scale, seeds.shape[0], columns, (code.block, places))


def decode(parts: SeedLMParts, code: SeedLMCode, columns: int, dtype: torch.dtype) -> Tensor:
    """Do as `decode_reference.decode`, bit for bit."""
    return launch.dense(regenerated(parts, code, columns), dtype)
