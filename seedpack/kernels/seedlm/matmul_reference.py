"""The definition of SeedLM's product, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack._shapes import Float
from seedpack.kernels.seedlm.code import SeedLMCode, SeedLMParts
from seedpack.kernels.seedlm.decode_reference import decode


def matmul(x: Float[Tensor, "tokens columns"], parts: SeedLMParts, code: SeedLMCode) -> Float[Tensor, "tokens rows"]:
    """Multiply x by the weight transposed; summed in float32, in the dtype of x."""
    return (x.float() @ decode(parts, code, x.shape[1], torch.float32).T).to(x.dtype)


def matmul_transposed(
    grad: Float[Tensor, "tokens rows"], parts: SeedLMParts, code: SeedLMCode, columns: int
) -> Float[Tensor, "tokens columns"]:
    """Multiply grad by the weight: the gradient of `matmul` to x; summed in float32, in the dtype of grad."""
    return (grad.float() @ decode(parts, code, columns, torch.float32)).to(grad.dtype)
