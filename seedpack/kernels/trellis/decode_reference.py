"""The definition of trellis decoding, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack._shapes import Float, Int, UInt8
from seedpack.kernels.trellis.code import TrellisCode

WEIGHTS_AT_ONCE = 1 << 20


def windows(stream: UInt8[Tensor, "rows groups bytes"], code: TrellisCode, count: int) -> Int[Tensor, "rows count"]:
    """Return window s of each row: bits [K·s, K·s + L) of its little-endian bit stream, and of what it runs on at."""
    octets = stream.flatten(1)
    size = octets.shape[1]
    first = torch.arange(count, device=stream.device) * code.symbol_bits
    word = torch.zeros(stream.shape[0], count, dtype=torch.int64, device=stream.device)
    for i in range(-(-(code.state_bits + 7) // 8)):
        place = (first >> 3) + i
        octet = octets[:, place % size].to(torch.int64)
        word |= (octet if code.tail_biting else octet * (place < size)) << 8 * i
    return word >> (first & 7) & ((1 << code.state_bits) - 1)


def decode(stream: UInt8[Tensor, "rows groups bytes"], code: TrellisCode, columns: int) -> Int[Tensor, "rows columns"]:
    """Return the integer of each weight, from its window.

    Args:
        stream: k bits per weight, packed as in `common.bits`; whole bytes per row.
        code: k, L, and the rest.
        columns: weights of a row; the stream may hold more, which are padding.

    Returns:
        int16 [rows, columns].
    """
    step = max(1, WEIGHTS_AT_ONCE // max(1, columns))
    count = -(-columns // code.weights)
    parts = [
        code.values(windows(rows, code, count)).flatten(1)[:, :columns].to(torch.int16) for rows in stream.split(step)
    ]
    return torch.cat(parts) if parts else torch.empty(0, columns, dtype=torch.int16, device=stream.device)


def dense(
    stream: UInt8[Tensor, "rows groups bytes"], scale: Float[Tensor, " rows"], code: TrellisCode, columns: int
) -> Float[Tensor, "rows columns"]:
    """Return the weight in its rotated basis, float32: float32(integer)·scale, rounded once."""
    return decode(stream, code, columns).to(torch.float32) * scale[:, None]
