"""The definition of the trellis's product, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack._shapes import Float, UInt8
from seedpack.kernels.trellis.decode_reference import dense

ACTIVATION_GROUP = 256  # activations that share a scale when they have 8 bits


def eight_bit_scale(groups: Float[Tensor, "tokens groups size"]) -> Float[Tensor, "tokens groups"]:
    """The step of 8-bit activations: the largest of a group is 127 of them."""
    return groups.abs().amax(2).clamp_min(1e-30) / 127


def rounded(x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens columns"]:
    """Activations rounded to 8 bits in groups of 256 along the input, float32."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % ACTIVATION_GROUP))
    groups = padded.unflatten(1, (-1, ACTIVATION_GROUP))
    step = eight_bit_scale(groups)[..., None]
    whole: Tensor = (groups / step).round() * step
    return whole.flatten(1)[:, : x.shape[1]]


def matmul(
    x: Float[Tensor, "tokens columns"],
    stream: UInt8[Tensor, "rows groups bytes"],
    scale: Float[Tensor, " rows"],
    code_bits: int,
    state_bits: int,
    key: int,
    circular: bool,
) -> Float[Tensor, "tokens rows"]:
    """x times the weight transposed, in the weight's rotated basis; summed in float32, in the dtype of x."""
    weight = dense(stream, scale, code_bits, state_bits, key, circular, x.shape[1])
    return (x.float() @ weight.T).to(x.dtype)


def matmul_transposed(
    grad: Float[Tensor, "tokens rows"],
    stream: UInt8[Tensor, "rows groups bytes"],
    scale: Float[Tensor, " rows"],
    code_bits: int,
    state_bits: int,
    key: int,
    circular: bool,
    columns: int,
) -> Float[Tensor, "tokens columns"]:
    """grad times the weight: the gradient of `matmul` to x; summed in float32, in the dtype of grad."""
    weight = dense(stream, scale, code_bits, state_bits, key, circular, columns)
    return (grad.float() @ weight).to(grad.dtype)
