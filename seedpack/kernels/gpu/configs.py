"""Block sizes and warps of each kernel: chosen from compiled code's registers where no GPU was at hand to measure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DENSE: dict[str, Any] = {"BLOCK_N": 8, "BLOCK_K": 256, "num_warps": 4}
FEW_TOKENS: dict[str, Any] = {"BLOCK_N": 4, "BLOCK_K": 128, "num_warps": 4}
HALF: dict[str, Any] = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
HALF_HEAVY: dict[str, Any] = {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
SINGLE: dict[str, Any] = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
GRAD_COEFS: dict[str, Any] = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4}
GRAD_PARTS = 8  # parts of the columns whose sums stay apart
MIX: dict[str, Any] = {"BLOCK": 16, "num_warps": 8}
ENOUGH_PROGRAMS = (
    528  # a product for few tokens is split along the input into so many, four for each of an H100's cores
)


def is_nvidia(device: torch.device) -> bool:
    """Whether a device has NVIDIA's own instructions."""
    return device.type == "cuda" and torch.version.hip is None


def precision(device: torch.device) -> str:
    """How float32 is multiplied on tensor cores without loss: in three parts where that is faster."""
    return "tf32x3" if is_nvidia(device) else "ieee"


def trellis_few_tokens(tokens: int) -> dict[str, Any]:
    """For the trellis's kernel for few tokens."""
    return {"BLOCK_N": 32 if tokens <= 2 else 16, "num_warps": 4}


def matmul(operand: Tensor, heavy: bool) -> dict[str, Any]:
    """For products on tensor cores, by the operand's dtype and by what a tile of the weight takes."""
    return SINGLE if operand.dtype != torch.float16 else HALF_HEAVY if heavy else HALF


def trellis_walk(code_bits: int, survivors: int, device: torch.device) -> dict[str, Any]:
    """For the trellis's search: states of a tile, predecessors in straight code, and registers that need no spilling."""
    block = min(1 << survivors, 1 << 12)
    return {
        "BLOCK": block, "UNROLLED": min(1 << code_bits, 8), "num_warps": max(1, min(8, block // 512)), "num_stages": 1,
    } | ({"maxnreg": 128} if is_nvidia(device) else {})  # fmt: skip


def seedlm_energies(block: int) -> dict[str, Any]:
    """For the bound of SeedLM's search: places of a block padded for tensor cores, seeds and blocks of a tile."""
    places = max(16, 1 << (block - 1).bit_length())
    return {"PLACES": places, "BLOCK_S": 64, "BLOCK_B": 64 if places <= 64 else 16, "num_warps": 4}


def programs(device: torch.device, jobs: int, warps: int, scratch_bytes: int) -> int:
    """How many programs share some jobs: as many as run at a time, if their scratch takes at most half of the free memory."""
    if device.type != "cuda":
        return min(jobs, 2)
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    room = torch.cuda.mem_get_info(device)[0] // 2 // scratch_bytes
    return max(1, min(jobs, cores * (16 // warps), room))
