"""The definition of the trellis's product, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack._shapes import Float, UInt8
from seedpack.kernels.dispatch import Backend
from seedpack.kernels.rotation import mix
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode_reference import dense

ACTIVATION_GROUP = 256  # activations that share a scale when they have 8 bits
LARGEST_SUM = {1: 127, 2: 126}  # of the magnitudes of a window's activations, in steps


def eight_bit_scale(groups: Float[Tensor, "tokens groups size"], weights: int) -> Float[Tensor, "tokens groups"]:
    """Return the step of 8-bit activations: the largest of a group is 127 of them.

    Where a window has two weights, bytes are multiplied with the sum and the difference of their activations: the largest
    |a| + |b| is 126 steps, so that it has 8 bits when both are rounded.
    """
    largest: Tensor = groups.abs().unflatten(2, (-1, weights)).sum(3).amax(2)
    return largest.clamp_min(1e-30) / LARGEST_SUM[weights]


def rounded(x: Float[Tensor, "tokens columns"], weights: int = 1) -> Float[Tensor, "tokens columns"]:
    """Round activations to 8 bits in groups of 256 along the input, for so many weights per window, float32."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % ACTIVATION_GROUP))
    groups = padded.unflatten(1, (-1, ACTIVATION_GROUP))
    step = eight_bit_scale(groups, weights)[..., None]
    whole: Tensor = (groups / step).round() * step
    return whole.flatten(1)[:, : x.shape[1]]


def matmul(
    x: Float[Tensor, "tokens columns"],
    stream: UInt8[Tensor, "rows groups bytes"],
    scale: Float[Tensor, " rows"],
    code: TrellisCode,
    dtype: torch.dtype,
    int8: bool,
) -> Float[Tensor, "tokens rows"]:
    """Multiply x by the weight transposed, in the weight's rotated basis; summed in float32."""
    x = rounded(x, code.weights) if int8 else x.float()
    return (x @ dense(stream, scale, code, x.shape[1]).T).to(dtype)


def linear(
    x: Float[Tensor, "tokens columns"],
    factor: Float[Tensor, " columns"],
    stream: UInt8[Tensor, "rows groups bytes"],
    scale: Float[Tensor, " rows"],
    code: TrellisCode,
    int8: bool,
    backend: Backend,
) -> Float[Tensor, "tokens rows"]:
    """Mix x and multiply it, in the dtype of x."""
    return matmul(mix(x, factor, backend), stream, scale, code, x.dtype, int8)


def matmul_transposed(
    grad: Float[Tensor, "tokens rows"],
    stream: UInt8[Tensor, "rows groups bytes"],
    scale: Float[Tensor, " rows"],
    code: TrellisCode,
    columns: int,
    dtype: torch.dtype,
) -> Float[Tensor, "tokens columns"]:
    """Multiply grad by the weight: the gradient of `matmul` to x; summed in float32."""
    return (grad.float() @ dense(stream, scale, code, columns)).to(dtype)
