"""The trellis's search: for each row the circular bit stream whose integers come nearest to the row's values."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from seedpack.kernels.dispatch import Backend, choose

BACKENDS = ("cpu", "triton", "reference")


def trellis_search(
    values: Tensor,
    *,
    code_bits: int,
    state_bits: int,
    key: int,
    survivors: int,
    columns: int,
    backend: Backend = "auto",
) -> Tensor:
    """The stream, packed as in `kernels.bits`, of values [rows, a multiple of 8]; see `reference.search`."""
    chosen = choose("trellis_search", backend, values.device, BACKENDS)
    kernels = import_module(f"seedpack.kernels.trellis_search.{chosen}")
    return kernels.search(values, code_bits, state_bits, key, survivors, columns)  # type: ignore[no-any-return]
