"""EXL3 as exllamav3 1.4 quantises a linear layer, written again in torch: its own quantiser needs a CUDA device.

Input and output channels are scaled and rotated in blocks of 128 (Hadamard with random signs), then tiles of 16 x 16 weights are
coded as tail-biting streams of 256 windows of 16 bits under its codebook `mul1`, by the whole Viterbi search, in the order of
tensor cores. Tiles of 16 input channels compensate for the errors of those before them (block LDLQ with the Hessian).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode import trellis_decode
from seedpack.kernels.trellis.search import trellis_search

TILE, BLOCK = 16, 128
MUL1 = 0x83DCD12D  # the sum of the bytes of MUL1·window, which is nearly normal
DEVIATION = math.sqrt(4 * (256**2 - 1) / 12)  # of that sum
DAMPENING = 0.025
SKEW = 0.15  # output channels are scaled where 2% of the inputs carry less than this share of the sum of RMS values


def exl3(weight: Tensor, hessian: Tensor, bits: int, seed: int = 0) -> tuple[Tensor, float]:
    """Return the weight [out, in] as EXL3 rebuilds it, and the bits per weight: codes, and float16 scales of both sides.

    Where a side is no multiple of 128 its rotation has blocks of the largest power of two that divides it: EXL3 would pad the
    layer, and store more. Sides that are no multiple of 16 are filled up with zeros, which count.
    """
    shape = weight.shape
    missing = [-side % TILE for side in shape]
    weight = torch.nn.functional.pad(weight, (0, missing[1], 0, missing[0]))
    hessian = torch.nn.functional.pad(hessian, (0, missing[1], 0, missing[1]))
    code = TrellisCode(bits, 16, 0, factor=MUL1)
    generator = torch.Generator().manual_seed(seed)
    columns, rows = weight.shape[1], weight.shape[0]
    signs = [torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1 for n in (columns, rows)]
    h = hessian.double() + DAMPENING * hessian.diagonal().double().mean() * torch.eye(columns, dtype=torch.float64)
    root = h.diagonal().sqrt().sort(descending=True).values
    factor = _rotated(_rotated(h * signs[0]).T * signs[0])
    feedback = _block_factor(factor)

    w = weight.double().T.clone()  # [in, out], as it stores them
    out_scale = signs[1].clone()
    if float(root[: columns // 50].sum() / root.sum()) < SKEW:
        rms = w.square().mean(0).sqrt()
        out_scale *= (rms / rms.mean()).clamp_min(1e-10)
    w = _rotated(w / out_scale)
    in_scale = signs[0] * w.square().mean(1).sqrt().clamp_min(1e-30) / DEVIATION
    w = _rotated((w / in_scale[:, None]).T).T
    unit = _scale(w, code)
    w, in_scale = w * unit, in_scale / unit

    found = torch.zeros_like(w)
    for end in range(columns, 0, -TILE):
        here = slice(end - TILE, end)
        found[here] = _coded(w[here] + feedback[end:, here].T @ (w[end:] - found[end:]), code)
    rebuilt = _rotated(_rotated(found.T).T * in_scale.half()[:, None].double()) * out_scale.half().double()
    stored = (bits + 16 / rows + 16 / columns) * weight.numel() / shape.numel()
    return rebuilt.T[: shape[0], : shape[1]].to(weight.dtype), stored


def _rotated(x: Tensor) -> Tensor:
    """Rotate the last dimension in blocks by the symmetric Hadamard matrix."""
    size = min(BLOCK, x.shape[-1] & -x.shape[-1])
    matrix = torch.ones(1, 1, dtype=x.dtype)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1))) / math.sqrt(2)
    return (x.reshape(*x.shape[:-1], -1, size) @ matrix).reshape(x.shape)


def _block_factor(h: Tensor) -> Tensor:
    """Return L of the Hessian's block LDL decomposition, lower triangular with blocks of `TILE`."""
    lower: Tensor = torch.linalg.cholesky(h)
    for first in range(0, len(h), TILE):
        here = slice(first, first + TILE)
        lower[:, here] = lower[:, here] @ torch.linalg.inv(lower[here, here])
    return lower


def _order() -> Tensor:
    """Return the place in a tile, row by row, of each weight of its stream."""
    lane = torch.arange(32)
    row, column = lane % 4 * 2, lane // 4
    places = [(row + r) * TILE + column + c for c in (0, 8) for r in (0, 1, 8, 9)]
    return torch.stack(places, 1).flatten()


def _tiles(rows: Tensor) -> Tensor:
    """Return the weights [16, out] of each tile in its stream's order, [tiles, 256]."""
    return rows.view(TILE, -1, TILE).transpose(0, 1).reshape(-1, TILE * TILE)[:, _order()]


def _searched(tiles: Tensor, code: TrellisCode) -> Tensor:
    survivors = code.memory_bits  # all: the whole search
    stream = trellis_search(tiles, code, survivors=survivors, columns=TILE * TILE)
    return trellis_decode(stream, code, columns=TILE * TILE).to(tiles.dtype)


def _coded(rows: Tensor, code: TrellisCode) -> Tensor:
    """Return what the tiles of 16 input channels [16, out] become."""
    found = _searched(_tiles(rows), code)[:, _order().argsort()]
    return found.view(-1, TILE, TILE).transpose(0, 1).reshape(rows.shape)


def _scale(w: Tensor, code: TrellisCode) -> float:
    """Return the factor of least error for a sample of tiles, along the diagonal: from a grid, refined by a parabola."""
    tiles_in, tiles_out = w.shape[0] // TILE, w.shape[1] // TILE
    count = max(tiles_in, tiles_out)
    at = [(i % tiles_in * TILE, i % tiles_out * TILE) for i in range(count)]
    sample = torch.cat([_tiles(w[i : i + TILE, j : j + TILE]) for i, j in at])
    units = [0.70 + 0.05 * i for i in range(8)]
    errors = [float((_searched(sample * unit, code) / unit - sample).square().mean()) for unit in units]
    best = min(max(errors.index(min(errors)), 1), len(units) - 2)
    before, least, after = errors[best - 1 : best + 2]
    bend = before - 2 * least + after
    step = 0.5 * (before - after) / bend if bend > 0 else 0.0
    return units[best] + 0.05 * min(max(step, -1.0), 1.0)  # a few tiles make no smooth curve
