"""The definition of the trellis's product of bytes, in plain torch: weights are rounded to 8 bits and activations to 8 or 16, and
sums are whole numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack._shapes import Float, Int8, UInt8
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode_reference import decode

LARGEST = 127  # of a rounded number
# The integers that have so many steps, by the weights of a window. Larger ones, a few in a thousand, become these: that gives
# less error than longer steps.
LARGEST_INTEGER = {1: 455, 2: 360}


def steps_of_one(code: TrellisCode) -> float:
    """Return how many steps of a rounded weight an integer of the code has."""
    return float(torch.tensor(LARGEST / LARGEST_INTEGER[code.weights], dtype=torch.float32))


def eight_bits(
    stream: UInt8[Tensor, "rows groups bytes"], code: TrellisCode, columns: int
) -> Int8[Tensor, "rows columns"]:
    """Return the integers of the weights in steps, rounded to the nearest, halves to even."""
    steps = (decode(stream, code, columns).float() * steps_of_one(code)).round()
    return steps.clamp(-LARGEST, LARGEST).to(torch.int8)


def rounded_tokens(
    x: Float[Tensor, "tokens columns"], planes: int
) -> tuple[Int8[Tensor, "planes*tokens columns"], Float[Tensor, "planes*tokens 1"]]:
    """Return activations in steps, rounded, and the step of each token: its largest activation has 127 of them. With two planes
    what is left follows, in steps of its own."""
    steps = [x.abs().amax(1, keepdim=True).clamp_min(1e-30) / LARGEST]
    codes = torch.empty(planes, *x.shape, dtype=torch.int8)
    whole = (x / steps[0]).round_()
    codes[0] = whole
    for plane in codes[1:]:
        left = whole.mul_(-steps[-1]).add_(x)
        steps.append(steps[-1] / (2 * LARGEST))
        plane.copy_(left.div_(steps[-1]).round_())
    return codes.flatten(0, 1), torch.cat(steps)


def matmul(
    x: Float[Tensor, "tokens columns"],
    stream: UInt8[Tensor, "rows groups bytes"],
    scale: Float[Tensor, " rows"],
    code: TrellisCode,
    planes: int,
    dtype: torch.dtype,
) -> Float[Tensor, "tokens rows"]:
    """Multiply x by the weight transposed, in the weight's rotated basis, both rounded."""
    codes, steps = rounded_tokens(x.float(), planes)
    whole = codes.double() @ eight_bits(stream, code, x.shape[1]).double().T
    products: Tensor = (whole.float() * steps).unflatten(0, (planes, len(x))).sum(0) * (scale / steps_of_one(code))
    return products.to(dtype)
