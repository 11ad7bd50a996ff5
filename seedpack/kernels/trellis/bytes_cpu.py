"""The trellis's product of bytes on the CPU: tiles of weights are decoded to 8 bits, and multiplied by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack.kernels.common.row_tiles import TILE_WEIGHTS, row_slices
from seedpack.kernels.trellis.bytes_reference import rounded_tokens, steps_of_one
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode_cpu import eight_bits


def matmul(x: Tensor, stream: Tensor, scale: Tensor, code: TrellisCode, planes: int, dtype: torch.dtype) -> Tensor:
    """Do as `bytes_reference.matmul`."""
    tokens, columns = x.shape
    codes, steps = rounded_tokens(x.float(), planes)
    out, scales = torch.empty(tokens, len(scale), dtype=dtype), scale / steps_of_one(code)
    tiles = row_slices(len(scale), columns, 2 * TILE_WEIGHTS)
    most = tiles[0].stop if tiles else 0  # memory is taken once: new pages take longer than the work in them
    tile = torch.empty(most, columns, dtype=torch.int8)
    sums, products = (torch.empty(len(codes) * most, dtype=kind) for kind in (torch.int32, torch.float32))
    for rows in tiles:
        count = rows.stop - rows.start
        weights = eight_bits(stream[rows], code, columns, out=tile[:count])
        whole, scaled = (values[: len(codes) * count].view(-1, count) for values in (sums, products))
        torch.mul(torch._int_mm(codes, weights.T, out=whole), steps, out=scaled)
        if planes == 2:
            scaled[:tokens] += scaled[tokens:]
        torch.mul(scaled[:tokens], scales[rows], out=out[:, rows])
    return out
