"""Trellis decoding on the CPU: the reference's integers, row by row, all cores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from seedpack.prng import trellis_multiplier

MARGIN = 8  # bytes of a row's beginning repeated behind its end: a 64-bit word starts in every byte


@njit(parallel=True, cache=True, nogil=True)
def _decode(stream: Any, code_bits: int, state_bits: int, multiplier: Any, key: Any, out: Any) -> None:
    size, columns = stream.shape[1], out.shape[1]
    mask = np.uint64((1 << state_bits) - 1)
    quads = -(-columns // 4)
    for r in prange(stream.shape[0]):
        row = np.empty(size + MARGIN, np.uint8)
        row[:size] = stream[r]
        for i in range(MARGIN):
            row[size + i] = stream[r, i % size]
        window = np.empty(4 * quads, np.uint32)
        for quad in range(quads):  # four weights start in one 64-bit word
            bit = quad * 4 * code_bits
            word = np.uint64(0)
            for i in range(8):
                word |= np.uint64(row[(bit >> 3) + i]) << np.uint64(8 * i)
            word >>= np.uint64(bit & 7)
            for j in range(4):
                window[4 * quad + j] = np.uint32((word >> np.uint64(j * code_bits)) & mask)
        for t in range(columns):
            h = np.uint32(window[t] * multiplier + key)
            pairs = (h & np.uint32(0x00FF00FF)) + ((h >> np.uint32(8)) & np.uint32(0x00FF00FF))
            out[r, t] = np.int16(np.int32((pairs + (pairs >> np.uint32(16))) & np.uint32(0xFFFF)) - np.int32(510))


def decode(stream: Tensor, code_bits: int, state_bits: int, key: int, columns: int) -> Tensor:
    """As `reference.decode`, bit for bit."""
    out = torch.empty(stream.shape[0], columns, dtype=torch.int16)
    multiplier = np.uint32(trellis_multiplier(code_bits, state_bits))
    rows = stream.contiguous().flatten(1).numpy()
    _decode(rows, code_bits, state_bits, multiplier, np.uint32(key), out.numpy())
    return out
