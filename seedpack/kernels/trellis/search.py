"""Search for each row the bit stream whose integers come nearest to the row's values."""

from __future__ import annotations

from torch import Tensor

from seedpack.kernels.dispatch import Backend, kernels_for
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.feedback import search_with_feedback
from seedpack.kernels.trellis.search_reference import search


def trellis_search(
    values: Tensor,
    code: TrellisCode,
    *,
    survivors: int,
    columns: int,
    factor: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return the stream, packed as in `common.bits`, of values [rows, a multiple of 8]; see `search_reference.search`.

    With `factor` [columns, columns], the stream of least error of the product with inputs, for a code that is not
    tail-biting; see `feedback.search_with_feedback`.
    """
    walk = kernels_for("trellis.search", backend, values.device).walk
    if factor is None:
        return search(values, code, survivors, columns, walk)
    return search_with_feedback(values, factor, code, survivors, columns, walk)
