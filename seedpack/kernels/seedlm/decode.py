"""Rebuild a SeedLM weight: each block of C values is U(seed)·(mantissas·2^exponent)."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack.kernels.dispatch import Backend, choose
from seedpack.kernels.seedlm import decode_reference as reference
from seedpack.kernels.seedlm.decode_reference import CODE_BITS

BACKENDS = ("cpu", "triton", "reference")
UNROLLED = 128  # states of a block up to which the CPU's kernels unroll their shifts
SEQUENCE, CODES = 64, 24  # bits of a block's sequence and of its codes that the GPU's kernels hold in an integer


def unable(seed_bits: int, block: int, rank: int) -> dict[str, str | None]:
    """Which backends do not take a codec's sizes, and why."""
    states = f"blocks of {block}×{rank} states of {seed_bits} bits are too large for it"
    fits = seed_bits + block * rank <= SEQUENCE and CODE_BITS * (rank + 1) <= CODES
    return {"cpu": None if block * rank <= UNROLLED else states, "triton": None if fits else states}


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
    sizes = (seed_bits, block, rank)
    chosen = choose("seedlm_decode", backend, seeds.device, BACKENDS, unable(*sizes))
    if chosen == "triton":
        from seedpack.kernels.seedlm import decode_triton as triton

        return triton.decode(seeds, codes, exponent_bias, *sizes, columns, dtype)
    if chosen == "cpu":
        from seedpack.kernels.seedlm import decode_cpu as cpu

        return cpu.decode(seeds, codes, exponent_bias, *sizes, columns).to(dtype)
    return reference.decode(seeds, codes, exponent_bias, *sizes, columns).to(dtype)
