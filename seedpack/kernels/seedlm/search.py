"""SeedLM's search: for each block of weights the seed, exponent and mantissas of least error, over all seeds."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from seedpack.kernels.dispatch import Backend, kernels_for
from seedpack.kernels.seedlm.code import SeedLMCode
from seedpack.kernels.seedlm.search_reference import BlockFits as BlockFits


def seedlm_search(
    blocks: Tensor,
    factor: Tensor | None,
    exponent_bias: int,
    code: SeedLMCode,
    *,
    exponents: int,
    backend: Backend = "auto",
) -> BlockFits:
    """Return the exact argmin of the quantised error for each block; see `search_reference.search` for what that is."""
    kernels = kernels_for("seedlm.search", backend, blocks.device)
    return cast(BlockFits, kernels.search(blocks, factor, exponent_bias, code, exponents))
