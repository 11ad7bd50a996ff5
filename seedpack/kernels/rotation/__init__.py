"""The random rotation of a weight's input side; see `reference`."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from seedpack.kernels.dispatch import Backend, choose
from seedpack.kernels.rotation import reference
from seedpack.kernels.rotation.reference import factors
from seedpack.kernels.rotation.reference import rotate as rotate
from seedpack.kernels.rotation.reference import signs as signs
from seedpack.kernels.rotation.reference import unrotate as unrotate

BACKENDS = ("cpu", "triton", "reference")
FEW_TOKENS = 8  # up to so many the compiled transforms win over products in torch
LARGEST = 128  # order of a matrix that the GPU's kernel holds in registers


def unable(width: int) -> dict[str, str | None]:
    """Backends that cannot mix a width, and why."""
    large = max(factors(width))
    return {"triton": None if large <= LARGEST else f"a factor of the width {width} is {large}"}


def mix(x: Tensor, factor: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """(x·diag(factor)) K for activations x [tokens, n], float32; K is symmetric and its own inverse.

    With factor = signs that is `rotate`.
    """
    chosen = choose("rotation", backend, x.device, BACKENDS, unable(x.shape[-1]))
    if chosen == "reference" or (backend == "auto" and x.shape[0] > FEW_TOKENS):
        return reference.mix(x if factor is None else x * factor)
    return import_module(f"seedpack.kernels.rotation.{chosen}").mix(x, factor)  # type: ignore[no-any-return]
