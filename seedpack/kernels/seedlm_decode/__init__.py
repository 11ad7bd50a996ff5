"""Rebuild a SeedLM weight: each block of C values is U(seed)·(mantissas·2^exponent)."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack.kernels.dispatch import Backend, choose
from seedpack.kernels.seedlm_decode import reference

BACKENDS = ("cpu", "reference")


def seedlm_decode(
    seeds: Tensor,
    codes: Tensor,
    exponent_bias: Tensor,
    *,
    seed_bits: int,
    block: int,
    rank: int,
    columns: int,
    dtype: torch.dtype,
    backend: Backend = "auto",
) -> Tensor:
    """The dense matrix [rows, columns] of the parts; see `reference.decode` for their form and the arithmetic."""
    if choose("seedlm_decode", backend, seeds.device, BACKENDS) == "cpu":
        from seedpack.kernels.seedlm_decode import cpu

        return cpu.decode(seeds, codes, exponent_bias, seed_bits, block, rank, columns).to(dtype)
    return reference.decode(seeds, codes, exponent_bias, seed_bits, block, rank, columns).to(dtype)
