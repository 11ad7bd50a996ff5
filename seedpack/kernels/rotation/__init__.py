"""Mix the input side of a weight, or activations, by a random rotation; see `reference`."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from seedpack.kernels.dispatch import Backend, kernels_for
from seedpack.kernels.rotation import reference
from seedpack.kernels.rotation.reference import factors
from seedpack.kernels.rotation.reference import rotate as rotate
from seedpack.kernels.rotation.reference import signs as signs
from seedpack.kernels.rotation.reference import unrotate as unrotate

FEW_TOKENS = 8  # up to so many the compiled transforms win over products in torch
LARGEST = 128  # order of a matrix that the GPU's kernel holds in registers


@lru_cache(maxsize=64)
def unable(width: int) -> dict[str, str | None]:
    """Say which backends cannot mix a width, and why."""
    large = max(factors(width))
    return {"triton": None if large <= LARGEST else f"a factor of the width {width} is {large}"}


def mix(x: Tensor, factor: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """Return (x·diag(factor)) K for activations x [tokens, n], float32; K is symmetric and its own inverse.

    With factor = signs that is `rotate`.
    """
    kernels = kernels_for("rotation", backend, x.device, unable(x.shape[-1]))
    if backend == "auto" and x.shape[0] > FEW_TOKENS:
        return reference.mix(x, factor)
    return kernels.mix(x, factor)
