"""The trellis's search for least error of a layer's output: each decision compensates for the errors of those before.

With H = E[x·xᵀ] of a layer's input the error of its output is tr(E·H·Eᵀ), E = Ŵ - W. With H = C·Cᵀ, C lower
triangular, that is ‖E·C‖²: column j of E·C holds the errors of the weights from j on, so that weights decided from the
last to the first can each be moved to undo the errors before (GPTQ, Frantar et al., arXiv 2210.17323; LDLQ, Chee et
al., arXiv 2307.13304, blockwise as in QuIP#, arXiv 2402.04396, eq. 5).

A trellis decides late: which symbol is best for a weight shows some weights on. So a walk goes over a block and as many
weights more as decide it, keeps the block, and starts again from its end. Within a block and beyond it errors count
alike, and are not compensated for: in a rotated basis that loses little (docs/calibration.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack._shapes import Float, UInt8
from seedpack.kernels.common.bits import pack
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.search_reference import Walk, in_walk_order, windows_of, zero_boundary
from seedpack.linalg import ldlq_correction

LEAST_BLOCK, BLOCK = 32, 128


def block_of(columns: int) -> int:
    """Return the weights of a block: about a twelfth of a row. Fewer cost time, as each block's walk goes beyond it, and more error;
    more of them are not compensated for among themselves."""
    return min(BLOCK, max(LEAST_BLOCK, columns // 192 * 16))


def lookahead(code: TrellisCode) -> int:
    """Return the weights beyond a block that decide it."""
    return max(16, code.weights * (2 * code.memory_symbols + 2))


def search_with_feedback(
    values: Float[Tensor, "rows padded"],
    factor: Float[Tensor, "columns columns"],
    code: TrellisCode,
    survivors: int,
    columns: int,
    walk: Walk,
) -> UInt8[Tensor, "rows groups bytes"]:
    """Find for each row a stream, not tail-biting, of little ‖(v - values)·C‖² over the first `columns` weights.

    Args:
        values: as in `search_reference.search`.
        factor: C, float64 [columns, columns], lower triangular, of full rank.
        code: as in `search_reference.search`; so is survivors.
        columns: weights of a row.
        walk: finds the symbols of a block.
    """
    padded, (block, beyond) = values.shape[1], (block_of(columns), lookahead(code))
    wanted = torch.nn.functional.pad(values[:, :columns].double(), (0, padded - columns))
    c = factor
    if padded > columns:
        c = torch.block_diag(factor, torch.eye(padded - columns, dtype=factor.dtype, device=factor.device))
    error = torch.zeros_like(wanted)
    symbols = torch.empty(len(wanted), padded // code.weights, dtype=torch.uint8, device=wanted.device)

    boundary, high = zero_boundary(wanted), padded
    while high:
        low = max(0, high - block)
        end = max(0, low - beyond)
        corrections = ldlq_correction(error, c, end, low, high), ldlq_correction(error, c, low, high, high)
        x = wanted[:, end:high] - torch.cat(corrections, 1)
        first, last = low // code.weights, high // code.weights
        kept = walk(in_walk_order(x, columns - end, code.weights), code, survivors, boundary)[:, : last - first]
        windows, memory = windows_of(boundary.memory, kept, code)
        error[:, low : min(high, columns)] = (code.values(windows.flip(1)).flatten(1) - wanted[:, low:high])[
            :, : max(0, columns - low)
        ]
        symbols[:, first:last], boundary, high = kept.flip(1), boundary._replace(memory=memory), low
    return pack(symbols, code.symbol_bits)
