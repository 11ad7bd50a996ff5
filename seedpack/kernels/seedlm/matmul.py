"""Multiply by a SeedLM weight straight from its seeds and codes; see `matmul_reference`."""

from __future__ import annotations

from torch import Tensor

from seedpack.kernels.dispatch import Backend, kernels_for
from seedpack.kernels.seedlm.code import SeedLMCode, SeedLMParts


def seedlm_matmul(x: Tensor, parts: SeedLMParts, code: SeedLMCode, *, backend: Backend = "auto") -> Tensor:
    """Multiply x [tokens, columns] by the weight [rows, columns] transposed, in the dtype of x."""
    return kernels_for("seedlm.matmul", backend, x.device, code.unable).matmul(x, parts, code)


def seedlm_matmul_transposed(
    grad: Tensor, parts: SeedLMParts, code: SeedLMCode, *, columns: int, backend: Backend = "auto"
) -> Tensor:
    """Multiply grad [tokens, rows] by the weight [rows, columns]: the gradient to x, in the dtype of grad."""
    kernels = kernels_for("seedlm.matmul", backend, grad.device, code.unable)
    return kernels.matmul_transposed(grad, parts, code, columns)
