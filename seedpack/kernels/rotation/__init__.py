"""The random rotation of a weight's input side; see `reference`."""

from __future__ import annotations

from torch import Tensor

from seedpack.kernels.dispatch import Backend, choose
from seedpack.kernels.rotation import reference
from seedpack.kernels.rotation.reference import rotate as rotate
from seedpack.kernels.rotation.reference import signs as signs
from seedpack.kernels.rotation.reference import unrotate as unrotate

BACKENDS = ("cpu", "reference")
FEW_TOKENS = 8  # up to so many the compiled transform wins over products in torch


def mix(x: Tensor, factor: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """(x·diag(factor)) K for activations x [tokens, n], float32; K is symmetric and its own inverse.

    With factor = signs that is `rotate`.
    """
    chosen = choose("rotation", backend, x.device, BACKENDS)
    if chosen == "cpu" and (backend == "cpu" or x.shape[0] <= FEW_TOKENS):
        from seedpack.kernels.rotation import cpu

        return cpu.mix(x, factor)
    return reference.mix(x if factor is None else x * factor)
