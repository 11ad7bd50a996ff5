"""The definition of SeedLM's product, in plain torch."""

from __future__ import annotations

from torch import Tensor

from seedpack._shapes import Float, Int, UInt8
from seedpack.kernels.seedlm.decode_reference import decode


def matmul(
    x: Float[Tensor, "tokens columns"],
    seeds: UInt8[Tensor, "rows g1 b1"],
    codes: UInt8[Tensor, "rows g2 b2"],
    exponent_bias: Int[Tensor, "1"],
    seed_bits: int,
    block: int,
    rank: int,
) -> Float[Tensor, "tokens rows"]:
    """x times the weight transposed; summed in float32, in the dtype of x."""
    return (x.float() @ decode(seeds, codes, exponent_bias, seed_bits, block, rank, x.shape[1]).T).to(x.dtype)


def matmul_transposed(
    grad: Float[Tensor, "tokens rows"],
    seeds: UInt8[Tensor, "rows g1 b1"],
    codes: UInt8[Tensor, "rows g2 b2"],
    exponent_bias: Int[Tensor, "1"],
    seed_bits: int,
    block: int,
    rank: int,
    columns: int,
) -> Float[Tensor, "tokens columns"]:
    """grad times the weight: the gradient of `matmul` to x; summed in float32, in the dtype of grad."""
    return (grad.float() @ decode(seeds, codes, exponent_bias, seed_bits, block, rank, columns)).to(grad.dtype)
