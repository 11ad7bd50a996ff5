"""What a user would pick instead, as plain rounding: the arithmetic of the grids, not the peers' kernels."""

from __future__ import annotations

import torch
from torch import Tensor

# NF4's levels, as published with QLoRA (Dettmers et al., arXiv 2305.14314, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4(weight: Tensor, group: int = 64) -> tuple[Tensor, float]:
    """bitsandbytes' NF4 with double quantisation of the scales: 4 + 8/64 + 32/(64·256) = 4.127 bits."""
    blocks = weight.reshape(-1, group)
    scale = blocks.abs().amax(1, keepdim=True)
    chunks = scale.flatten().split(256)
    doubled = []
    for chunk in chunks:  # int8 of the scales less their mean, one float32 for 256 of them
        mean = scale.mean()
        step = (chunk - mean).abs().amax() / 127
        doubled.append((chunk - mean).div(step).round() * step + mean)
    scale = torch.cat(doubled)[:, None]
    index = (blocks / scale)[..., None].sub(NF4).abs().argmin(-1)
    return (NF4[index] * scale).view(weight.shape), 4 + 8 / group + 32 / (group * 256)


def rtn(weight: Tensor, bits: int, group: int) -> tuple[Tensor, float]:
    """Round to nearest between minimum and maximum of each group, with fp16 scale and offset."""
    blocks = weight.reshape(-1, group)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float()
    low = low.half().float()
    codes = ((blocks - low) / step).round().clamp(0, 2**bits - 1)
    return (codes * step + low).view(weight.shape), bits + 32 / group


def rtn_clipped(weight: Tensor, bits: int, group: int) -> tuple[Tensor, float]:
    """Symmetric rounding with the fp16 scale of least squared error among 40 clippings of each group."""
    blocks = weight.reshape(-1, group)
    half = 2 ** (bits - 1)
    top = blocks.abs().amax(1, keepdim=True)
    best = torch.full_like(top, torch.inf)
    result = torch.zeros_like(blocks)
    for clip in torch.linspace(0.5, 1.1, 40):
        step = (top * clip / (half - 0.5)).half().float()
        candidate = (blocks / step).round().clamp(-half, half - 1) * step
        error = (candidate - blocks).square().sum(1, keepdim=True)
        result = torch.where(error < best, candidate, result)
        best = torch.minimum(error, best)
    return result.view(weight.shape), bits + 16 / group
