"""Weights in few bits, made of dense ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


def float8_blocks(weight: Tensor, block: int = 16) -> tuple[Tensor, Tensor]:
    """Return a matrix in float8, and a scale for each block; the last ones are cut off."""
    counts = [-(-n // block) for n in weight.shape]
    scale = torch.empty(counts)
    spread = torch.empty(weight.shape)
    for i in range(counts[0]):
        for j in range(counts[1]):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scale[i, j] = spread[part] = weight[part].float().abs().max() / 448
    return (weight / spread).to(torch.float8_e4m3fn), scale


def spread_blocks(scale: Tensor, shape: torch.Size, block: int) -> Tensor:
    """Return the scale of every weight."""
    rows, columns = (torch.arange(n) // block for n in shape)
    return scale[rows][:, columns]


def rewritten(folder: Path, change: Callable[[State], State], **config: Any) -> Path:
    """Replace a folder's tensors, and keys of its config."""
    state = change(load_file(folder / "model.safetensors"))
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder
