"""SeedLM's search: for each block of weights the seed, exponent and mantissas of least error, over all seeds."""

from __future__ import annotations

from torch import Tensor

from seedpack.kernels.dispatch import Backend, choose
from seedpack.kernels.seedlm_search import reference
from seedpack.kernels.seedlm_search.reference import Found as Found

BACKENDS = ("cpu", "reference")


def seedlm_search(
    blocks: Tensor,
    importance: Tensor | None,
    exponent_bias: int,
    *,
    seed_bits: int,
    rank: int,
    exponents: int,
    backend: Backend = "auto",
) -> Found:
    """The exact argmin of the quantised error for each block; see `reference.search` for what that is."""
    if choose("seedlm_search", backend, blocks.device, BACKENDS) == "cpu":
        from seedpack.kernels.seedlm_search import cpu

        return cpu.search(blocks, importance, exponent_bias, seed_bits, rank, exponents)
    return reference.search(blocks, importance, exponent_bias, seed_bits, rank, exponents)
