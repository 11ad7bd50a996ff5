"""SeedLM decoding on the CPU: the reference's arithmetic, block by block, all cores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from seedpack.errors import CodecError
from seedpack.kernels.seedlm_decode.reference import tables


@njit(inline="always")
def _field(row: Any, index: int, bits: int) -> int:
    """Field `index` of a row's little-endian bit stream; at most 24 bits wide."""
    bit = index * bits
    byte = bit >> 3
    value: Any = np.int64(row[byte])
    for i in range(1, 4):
        if byte + i < row.shape[0]:
            value |= np.int64(row[byte + i]) << (8 * i)
    return (value >> (bit & 7)) & ((1 << bits) - 1)  # type: ignore[no-any-return]


@njit(parallel=True, cache=True, nogil=True)
def _decode(
    seeds: Any, codes: Any, bias: int, position: Any, cycle: Any, seed_bits: int, block: int, rank: int,
    columns: int, unit: Any, powers: Any, out: Any,
) -> None:  # fmt: skip
    blocks = -(-columns // block)
    for r in prange(seeds.shape[0]):
        total = np.empty(block, np.int32)
        for b in range(blocks):
            start = position[_field(seeds[r], b, seed_bits)] + 1
            total[:] = 0
            for p in range(rank):
                mantissa = np.int32((_field(codes[r], b * (rank + 1) + 1 + p, 4) ^ 8) - 8)
                for c in range(block):
                    total[c] += cycle[start + c * rank + p] * mantissa
            scale = powers[(_field(codes[r], b * (rank + 1), 4) ^ 8) - 8 + bias + 127]
            for c in range(min(block, columns - b * block)):
                out[r, b * block + c] = np.float32(total[c]) * unit * scale


_POWERS = np.ldexp(np.float32(1), np.arange(-127, 128))


def decode(
    seeds: Tensor, codes: Tensor, exponent_bias: Tensor, seed_bits: int, block: int, rank: int, columns: int
) -> Tensor:
    """As `reference.decode`, bit for bit."""
    position, cycle = tables(seed_bits, block * rank, torch.device("cpu"))
    if not -118 <= int(exponent_bias) <= 120:  # the kernel's table of powers ends there
        raise CodecError(f"seedlm: exponent bias {int(exponent_bias)} is not in -118 … 120")
    rows = seeds.shape[0]
    out = torch.empty(rows, columns, dtype=torch.float32)
    _decode(
        seeds.contiguous().flatten(1).numpy(),
        codes.contiguous().flatten(1).numpy(),
        int(exponent_bias),
        position.numpy(),
        cycle.numpy(),
        seed_bits,
        block,
        rank,
        columns,
        np.float32(1.0 / ((1 << (seed_bits - 1)) - 1)),
        _POWERS,
        out.numpy(),
    )
    return out
