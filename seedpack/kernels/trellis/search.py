"""The trellis's search: for each row the bit stream whose integers come nearest to the row's values."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from seedpack.kernels.dispatch import Backend, choose
from seedpack.kernels.trellis.feedback import search_with_feedback
from seedpack.kernels.trellis.search_reference import Code, search

BACKENDS = ("cpu", "triton", "reference")


def trellis_search(
    values: Tensor,
    *,
    code_bits: int,
    state_bits: int,
    key: int,
    survivors: int,
    columns: int,
    circular: bool = True,
    factor: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The stream, packed as in `kernels.bits`, of values [rows, a multiple of 8]; see `reference.search`.

    With `factor` [columns, columns], of least error of the product with inputs, for streams that are not circular; see
    `feedback.search_with_feedback`.
    """
    chosen = choose("trellis_search", backend, values.device, BACKENDS)
    walk = import_module(f"seedpack.kernels.trellis.search_{chosen}").walk
    code = Code(code_bits, state_bits, key, survivors)
    if factor is None:
        return search(values, code, columns, circular, walk)
    return search_with_feedback(values, factor, code, columns, walk)
