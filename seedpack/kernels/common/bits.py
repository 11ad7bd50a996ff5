"""Fields of a fixed number of bits, packed into bytes: docs/format.md, "bit fields".

Field i of a row occupies bits [i·bits, (i+1)·bits) of the row's little-endian bit stream. Rows are stored as
[rows, groups, bytes]: a group is the fewest fields that fill whole bytes, the last one padded with zero bits.
"""

from __future__ import annotations

from math import gcd

import numpy as np
import torch
from torch import Tensor

from seedpack._shapes import Int, UInt8

BITS_AT_ONCE = 1 << 20


def packed_shape(rows: int, fields: int, bits: int) -> tuple[int, int, int]:
    """Return the shape of the packed bytes.

    >>> packed_shape(3, 10, 16), packed_shape(3, 9, 20)
    ((3, 10, 2), (3, 5, 5))
    """
    group = 8 // gcd(8, bits)
    return rows, -(-fields // group), group * bits // 8


def pack(values: Int[Tensor, "rows fields"], bits: int) -> UInt8[Tensor, "rows groups bytes"]:
    """Pack the low `bits` bits of each value (negative values in two's complement). `bits` is at most 62."""
    rows, fields = values.shape
    shape = packed_shape(rows, fields, bits)
    group = shape[2] * 8 // bits
    if bits == 16 and values.device.type == "cpu":
        return values.to(torch.int16).contiguous().view(torch.uint8).reshape(shape)
    if values.dtype == torch.uint8 and values.device.type == "cpu":
        octets = torch.nn.functional.pad(values, (0, shape[1] * group - fields)).numpy()
        fields_of_bits = np.unpackbits(octets[..., None], axis=-1, count=bits, bitorder="little")
        return torch.from_numpy(np.packbits(fields_of_bits.reshape(rows, -1), axis=-1, bitorder="little")).view(shape)
    out = torch.empty(shape, dtype=torch.uint8, device=values.device)
    place, weight = torch.arange(bits, device=values.device), 1 << torch.arange(8, device=values.device)
    step = max(1, BITS_AT_ONCE // (fields * bits))
    for row in range(0, rows, step):
        chunk = values[row : row + step].to(torch.int64)
        chunk = torch.nn.functional.pad(chunk, (0, shape[1] * group - fields))
        stream = (chunk[..., None] >> place & 1).reshape(-1, shape[1], shape[2], 8)
        out[row : row + step] = (stream * weight).sum(-1)
    return out


def unpack(packed: UInt8[Tensor, "rows groups bytes"], fields: int, bits: int) -> Int[Tensor, "rows fields"]:
    """Return the unsigned fields, int64 [rows, fields]: the inverse of `pack`."""
    rows, groups, width = packed.shape
    if bits == 16:
        low, high = packed.to(torch.int64).unbind(-1)
        return (low | high << 8)[:, :fields]
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).reshape(rows, -1)[:, :fields].to(torch.int64)
    out = torch.empty(rows, fields, dtype=torch.int64, device=packed.device)
    place, weight = torch.arange(8, device=packed.device), 1 << torch.arange(bits, device=packed.device)
    step = max(1, BITS_AT_ONCE // (groups * width * 8))
    for row in range(0, rows, step):
        stream = (packed[row : row + step, ..., None].to(torch.int64) >> place & 1).reshape(
            -1, groups * width * 8 // bits, bits
        )
        out[row : row + step] = (stream * weight).sum(-1)[:, :fields]
    return out


def signed(values: Tensor, bits: int) -> Tensor:
    """Return the signed value of unsigned fields in two's complement."""
    half = 1 << (bits - 1)
    return (values ^ half) - half
