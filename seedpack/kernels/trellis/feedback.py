"""The trellis's search for least error of a layer's output: each decision answers for the errors of those before.

With H = E[x·xᵀ] of a layer's input the error of its output is tr(E·H·Eᵀ), E = Ŵ - W. With H = C·Cᵀ, C lower
triangular, that is ‖E·C‖²: column j of E·C holds the errors of the weights from j on, so that weights decided from the
last to the first can each be moved to undo the errors before (GPTQ, Frantar et al., arXiv 2210.17323; LDLQ, Chee et
al., arXiv 2307.13304, blockwise as in QuIP#, arXiv 2402.04396, eq. 5).

A trellis decides late: which symbol is best for a weight shows some weights on. So a walk goes over a block and as many
weights more as decide it, keeps the block, and starts again from its end. Within a block and beyond it errors count
alike, and are not answered for: in a rotated basis that loses little (docs/calibration.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack._shapes import Float, UInt8
from seedpack.kernels.common.bits import pack
from seedpack.kernels.trellis.search_reference import Code, Walk, from_zeros, in_walk_order, seam_symbols, windows_of
from seedpack.linalg import answer
from seedpack.prng import trellis_multiplier, trellis_values

BLOCK, WIDE_BLOCK, WIDE = 32, 64, 1024


def lookahead(code: Code) -> int:
    """Weights beyond a block that decide it."""
    return max(16, 2 * seam_symbols(code.code_bits, code.state_bits) + 2)


def search_with_feedback(
    values: Float[Tensor, "rows padded"],
    factor: Float[Tensor, "columns columns"],
    code: Code,
    columns: int,
    walk: Walk,
) -> UInt8[Tensor, "rows groups bytes"]:
    """For each row a stream, not circular, of little ‖(v - values)·C‖² over the first `columns` weights.

    Args:
        values: as in `reference.search`.
        factor: C, float64 [columns, columns], lower triangular, of full rank.
        code: as in `reference.search`.
        columns: weights of a row.
        walk: what does the work.
    """
    padded, (block, beyond) = values.shape[1], (BLOCK if columns < WIDE else WIDE_BLOCK, lookahead(code))
    wanted = torch.nn.functional.pad(values[:, :columns].double(), (0, padded - columns))
    c = factor
    if padded > columns:
        c = torch.block_diag(factor, torch.eye(padded - columns, dtype=factor.dtype, device=factor.device))
    error, symbols = torch.zeros_like(wanted), torch.empty(wanted.shape, dtype=torch.uint8, device=wanted.device)

    start, high = from_zeros(wanted), padded
    while high:
        low = max(0, high - block)
        end = max(0, low - beyond)
        x = wanted[:, end:high] - torch.cat((answer(error, c, end, low, high), answer(error, c, low, high, high)), 1)
        kept = walk(in_walk_order(x, columns - end), code, start)[:, : high - low]
        windows, memory = windows_of(start.memory, kept, code)
        found = trellis_values(windows.flip(1), trellis_multiplier(code.code_bits, code.state_bits), code.key)
        error[:, low : min(high, columns)] = (found - wanted[:, low:high])[:, : max(0, columns - low)]
        symbols[:, low:high], start, high = kept.flip(1), start._replace(memory=memory), low
    return pack(symbols, code.code_bits)
