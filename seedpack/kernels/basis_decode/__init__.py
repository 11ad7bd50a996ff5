"""Rebuild a weight that is noise times coefficients; see `reference`."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from seedpack.kernels.basis_decode.reference import require_basis
from seedpack.kernels.dispatch import Backend, choose

BACKENDS = ("cpu", "triton", "reference")


def basis_dense(
    coefs: Tensor, *, seed: int, generator: str, rows: int, columns: int, backend: Backend = "auto"
) -> Tensor:
    """float32 [rows, columns] from coefficients [blocks, M]; see `reference.dense`."""
    require_basis(generator, coefs.shape, rows)
    chosen = choose("basis_dense", backend, coefs.device, BACKENDS)
    kernels = import_module(f"seedpack.kernels.basis_decode.{chosen}")
    return kernels.dense(coefs, seed, generator, rows, columns)  # type: ignore[no-any-return]
