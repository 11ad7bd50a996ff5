"""SeedLM's search: for each block of weights the seed, exponent and mantissas of least error, over all seeds."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from seedpack.kernels.dispatch import Backend, choose
from seedpack.kernels.seedlm.search_reference import Found as Found

BACKENDS = ("cpu", "triton", "reference")


def seedlm_search(
    blocks: Tensor,
    factor: Tensor | None,
    exponent_bias: int,
    *,
    seed_bits: int,
    rank: int,
    exponents: int,
    backend: Backend = "auto",
) -> Found:
    """The exact argmin of the quantised error for each block; see `reference.search` for what that is."""
    chosen = choose("seedlm_search", backend, blocks.device, BACKENDS)
    kernels = import_module(f"seedpack.kernels.seedlm.search_{chosen}")
    return kernels.search(blocks, factor, exponent_bias, seed_bits, rank, exponents)  # type: ignore[no-any-return]
