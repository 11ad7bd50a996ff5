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


def mix(x: Tensor, factor: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """(x·diag(factor)) K for activations x [tokens, n], float32; K is symmetric and its own inverse.

    With factor = signs that is `rotate`.
    """
    large = max(factors(x.shape[-1]))
    unable = {"triton": None if large <= LARGEST else f"a factor of the width {x.shape[-1]} is {large}"}
    chosen = choose("rotation", backend, x.device, BACKENDS, unable)
    if chosen == "reference" or (backend == "auto" and x.shape[0] > FEW_TOKENS):
        return reference.mix(x if factor is None else x * factor)
    return import_module(f"seedpack.kernels.rotation.{chosen}").mix(x, factor)  # type: ignore[no-any-return]
