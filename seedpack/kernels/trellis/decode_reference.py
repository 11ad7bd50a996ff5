"""The definition of trellis decoding, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack._shapes import Float, Int, UInt8
from seedpack.prng import trellis_multiplier, trellis_values

WEIGHTS_AT_ONCE = 1 << 20


def windows(
    stream: UInt8[Tensor, "rows groups bytes"], code_bits: int, state_bits: int, circular: bool, columns: int
) -> Int[Tensor, "rows columns"]:
    """Window t of a row: bits [k·t, k·t + L) of its little-endian bit stream, which runs on at its own beginning, or at zeros."""
    octets = stream.flatten(1)
    size = octets.shape[1]
    first = torch.arange(columns, device=stream.device) * code_bits
    word = torch.zeros(stream.shape[0], columns, dtype=torch.int64, device=stream.device)
    for i in range(-(-(state_bits + 7) // 8)):
        place = (first >> 3) + i
        octet = octets[:, place % size].to(torch.int64)
        word |= (octet if circular else octet * (place < size)) << 8 * i
    return word >> (first & 7) & ((1 << state_bits) - 1)


def decode(
    stream: UInt8[Tensor, "rows groups bytes"], code_bits: int, state_bits: int, key: int, circular: bool, columns: int
) -> Int[Tensor, "rows columns"]:
    """The integer of each weight: `prng.trellis_values` of its window.

    Args:
        stream: k bits a weight, packed as in `kernels.bits`; whole bytes a row.
        code_bits: k.
        state_bits: L.
        key: c.
        circular: whether the stream runs on at its own beginning.
        columns: weights of a row; the stream may hold more, which are padding.

    Returns:
        int16 [rows, columns].
    """
    step = max(1, WEIGHTS_AT_ONCE // max(1, columns))
    multiplier = trellis_multiplier(code_bits, state_bits)
    parts = [
        trellis_values(windows(rows, code_bits, state_bits, circular, columns), multiplier, key).to(torch.int16)
        for rows in stream.split(step)
    ]
    return torch.cat(parts) if parts else torch.empty(0, columns, dtype=torch.int16, device=stream.device)


def dense(
    stream: UInt8[Tensor, "rows groups bytes"],
    scale: Float[Tensor, " rows"],
    code_bits: int,
    state_bits: int,
    key: int,
    circular: bool,
    columns: int,
) -> Float[Tensor, "rows columns"]:
    """The weight in its rotated basis, float32 [rows, columns]: float32(integer)·scale, rounded once."""
    return decode(stream, code_bits, state_bits, key, circular, columns).to(torch.float32) * scale[:, None]
