"""The definition of the trellis's product, in plain torch."""

from __future__ import annotations

from torch import Tensor

from seedpack._shapes import Float, UInt8
from seedpack.kernels.trellis_decode.reference import dense


def matmul(
    x: Float[Tensor, "tokens columns"],
    stream: UInt8[Tensor, "rows groups bytes"],
    scale: Float[Tensor, " rows"],
    code_bits: int,
    state_bits: int,
    key: int,
) -> Float[Tensor, "tokens rows"]:
    """x times the weight transposed, in the weight's rotated basis; summed in float32, in the dtype of x."""
    weight = dense(stream, scale, code_bits, state_bits, key, x.shape[1])
    return (x.float() @ weight.T).to(x.dtype)


def matmul_transposed(
    grad: Float[Tensor, "tokens rows"],
    stream: UInt8[Tensor, "rows groups bytes"],
    scale: Float[Tensor, " rows"],
    code_bits: int,
    state_bits: int,
    key: int,
    columns: int,
) -> Float[Tensor, "tokens columns"]:
    """grad times the weight: the gradient of `matmul` to x; summed in float32, in the dtype of grad."""
    weight = dense(stream, scale, code_bits, state_bits, key, columns)
    return (grad.float() @ weight).to(grad.dtype)
