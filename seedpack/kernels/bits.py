"""Fields of a fixed number of bits, packed into bytes: docs/format.md, "bit fields".

Field i of a row occupies bits [i·bits, (i+1)·bits) of the row's little-endian bit stream. Rows are stored as
[rows, groups, bytes]: a group is the fewest fields that fill whole bytes, the last one padded with zero bits.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from seedpack._shapes import Int, UInt8


def packed_shape(rows: int, fields: int, bits: int) -> tuple[int, int, int]:
    """Shape of the packed bytes.

    >>> packed_shape(3, 10, 16), packed_shape(3, 9, 20)
    ((3, 10, 2), (3, 5, 5))
    """
    group = 8 // gcd(8, bits)
    return rows, -(-fields // group), group * bits // 8


def pack(values: Int[Tensor, "rows fields"], bits: int) -> UInt8[Tensor, "rows groups bytes"]:
    """Pack the low `bits` bits of each value (negative values in two's complement). `bits` is at most 62."""
    rows, groups, width = shape = packed_shape(*values.shape, bits)
    group = width * 8 // bits
    padded = torch.zeros(rows, groups * group, dtype=torch.int64, device=values.device)
    padded[:, : values.shape[1]] = values
    place = torch.arange(bits, device=values.device)
    stream = (padded[..., None] >> place & 1).reshape(rows, groups, width, 8)
    weight = 1 << torch.arange(8, device=values.device)
    return (stream * weight).sum(-1).to(torch.uint8).reshape(shape)


def unpack(packed: UInt8[Tensor, "rows groups bytes"], fields: int, bits: int) -> Int[Tensor, "rows fields"]:
    """The unsigned fields, int64 [rows, fields]; the inverse of `pack`."""
    rows, groups, width = packed.shape
    place = torch.arange(8, device=packed.device)
    stream = (packed[..., None].to(torch.int64) >> place & 1).reshape(rows, groups * width * 8 // bits, bits)
    weight = 1 << torch.arange(bits, device=packed.device)
    return (stream * weight).sum(-1)[:, :fields]


def signed(values: Tensor, bits: int) -> Tensor:
    """Two's complement: the unsigned field's signed value."""
    half = 1 << (bits - 1)
    return (values ^ half) - half
