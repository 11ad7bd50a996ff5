"""SeedLM's product in Triton: `gpu_tiles` over the tiles of `decode_triton`."""

from __future__ import annotations

from torch import Tensor

from seedpack.kernels.common import gpu_launch as launch
from seedpack.kernels.seedlm.code import SeedLMCode, SeedLMParts
from seedpack.kernels.seedlm.decode_triton import regenerated


def matmul(x: Tensor, parts: SeedLMParts, code: SeedLMCode) -> Tensor:
    """Do as `matmul_reference.matmul`, summed in another order, and in float16 on tensor cores for many tokens of 16 bits."""
    return launch.matmul(x, regenerated(parts, code, x.shape[1]), x.dtype)


def matmul_transposed(grad: Tensor, parts: SeedLMParts, code: SeedLMCode, columns: int) -> Tensor:
    """Do as `matmul_reference.matmul_transposed`, exact as `matmul` is."""
    return launch.matmul_transposed(grad, regenerated(parts, code, columns), grad.dtype)
