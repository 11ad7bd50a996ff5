"""The definition of a trellis weight's factors, in plain torch: of its rows from scales and exponent, of its input from the balance."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack._shapes import Float, Int, UInt8
from seedpack.kernels.common.bits import unpack

VALUE_UNIT = 1 / 128  # a value of the code in units of the scale: a power of two, so it rounds nothing
BALANCE_BITS = 4


def row_scales(scales: Int[Tensor, " rows"], exponent: Int[Tensor, " one"]) -> Float[Tensor, " rows"]:
    """Return the scales of the integers, float32, exact: those stored, bit patterns of float16, times 2^exponent."""
    return torch.ldexp(scales.view(torch.float16).float(), exponent.float()) * VALUE_UNIT


def input_scales(balance: UInt8[Tensor, "one groups bytes"], columns: int) -> Float[Tensor, " columns"]:
    """Return the factor that each input channel of the weight was multiplied by, float32: 2^((q - 8) / 4)."""
    factors = torch.tensor(
        [2 ** ((q - 8) / 4) for q in range(1 << BALANCE_BITS)], dtype=torch.float32, device=balance.device
    )
    return factors[unpack(balance, columns, BALANCE_BITS)[0]]


def prepare(
    scales: Int[Tensor, " rows"],
    exponent: Int[Tensor, " one"],
    balance: UInt8[Tensor, "one groups bytes"] | None,
    signs: Float[Tensor, " columns"],
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """Return the scales of the integers, and the factors of activations before they are mixed: signs over the input's."""
    factor = signs if balance is None else signs / input_scales(balance, len(signs))
    return row_scales(scales, exponent), factor
