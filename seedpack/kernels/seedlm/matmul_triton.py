"""SeedLM's product in Triton: `gpu_tiles` over the tiles of `seedlm_decode`."""

from __future__ import annotations

from torch import Tensor

from seedpack.kernels.common import gpu_launch as launch
from seedpack.kernels.seedlm.decode_triton import regenerated


def matmul(
    x: Tensor, seeds: Tensor, codes: Tensor, exponent_bias: Tensor, seed_bits: int, block: int, rank: int
) -> Tensor:
    """As `reference.matmul`, summed in another order, and in float16 on tensor cores for many tokens of 16 bits."""
    weight = regenerated(seeds, codes, exponent_bias, seed_bits, block, rank, x.shape[1])
    return launch.matmul(x, weight, x.dtype)


def matmul_transposed(
    grad: Tensor, seeds: Tensor, codes: Tensor, exponent_bias: Tensor, seed_bits: int, block: int, rank: int,
    columns: int,
) -> Tensor:  # fmt: skip
    """As `reference.matmul_transposed`, exact as `matmul` is."""
    weight = regenerated(seeds, codes, exponent_bias, seed_bits, block, rank, columns)
    return launch.matmul_transposed(grad, weight, grad.dtype)
