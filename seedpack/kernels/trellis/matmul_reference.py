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


def eight_bit_scale(groups: Float[Tensor, "tokens groups size"]) -> Float[Tensor, "tokens groups"]:
    """Return the step of 8-bit activations: the largest of a group is 127 of them."""
    return groups.abs().amax(2).clamp_min(1e-30) / 127


def rounded(x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens columns"]:
    """Round activations to 8 bits in groups of 256 along the input, float32."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % ACTIVATION_GROUP))
    groups = padded.unflatten(1, (-1, ACTIVATION_GROUP))
    step = eight_bit_scale(groups)[..., None]
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
    x = rounded(x) if int8 else x.float()
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
