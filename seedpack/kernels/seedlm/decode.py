"""Rebuild a SeedLM weight: each block of C values is U(seed)·(mantissas·2^exponent)."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack.kernels.dispatch import Backend, kernels_for
from seedpack.kernels.seedlm.code import SeedLMCode, SeedLMParts


def seedlm_decode(
    parts: SeedLMParts, code: SeedLMCode, *, columns: int, dtype: torch.dtype, backend: Backend = "auto"
) -> Tensor:
    """Return the dense matrix [rows, columns] of the parts; see `decode_reference.decode` for the arithmetic."""
    return kernels_for("seedlm.decode", backend, parts.seeds.device, code.unable).decode(parts, code, columns, dtype)
