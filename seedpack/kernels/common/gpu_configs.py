"""Choose block sizes and warps of each kernel by GPU architecture: measured ones in `TUNED`, for the rest `triton.autotune`
chooses among `CANDIDATES`. The first candidate is chosen from the compiled code's registers, and used where nothing can be
measured."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]

# Architecture ("sm_90", "gfx942") -> kernel -> configuration. `make bench-gpu` prints what it found best. None has been
# measured yet.
TUNED: dict[str, dict[str, Config]] = {}


def _tiles(*sizes: tuple[int, ...]) -> tuple[Config, ...]:
    """Return configurations of (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return tuple(dict(zip(names, size, strict=True)) for size in sizes)


CANDIDATES: dict[str, tuple[Config, ...]] = {
    "dense": (
        {"BLOCK_N": 8, "BLOCK_K": 256, "num_warps": 4},
        {"BLOCK_N": 4, "BLOCK_K": 256, "num_warps": 4},
        {"BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 4},
        {"BLOCK_N": 4, "BLOCK_K": 512, "num_warps": 8},
    ),
    "few_tokens": (
        {"BLOCK_N": 4, "BLOCK_K": 128, "num_warps": 4},
        {"BLOCK_N": 2, "BLOCK_K": 128, "num_warps": 4},
        {"BLOCK_N": 4, "BLOCK_K": 256, "num_warps": 8},
        {"BLOCK_N": 8, "BLOCK_K": 64, "num_warps": 4},
    ),
    "trellis_1_token": tuple({"BLOCK_N": n, "num_warps": w} for n, w in ((32, 4), (16, 4), (8, 4), (16, 2), (32, 8))),
    "trellis_few_tokens": tuple({"BLOCK_N": n, "num_warps": w} for n, w in ((16, 8), (8, 4), (16, 4), (32, 8))),
    "matmul_half": _tiles(
        (128, 64, 64, 8, 2),
        (128, 64, 64, 8, 3),
        (128, 64, 32, 4, 3),
        (64, 64, 64, 4, 3),
        (128, 128, 32, 8, 3),
        (256, 64, 32, 8, 3),
        (32, 64, 64, 4, 3),
    ),
    "matmul_heavy": _tiles((128, 32, 64, 8, 2), (64, 32, 64, 4, 2), (128, 32, 32, 4, 2), (32, 32, 64, 4, 2)),
    "matmul_single": _tiles((32, 64, 32, 8, 2), (64, 64, 32, 8, 2), (32, 32, 32, 4, 2)),
}
# From so many tokens on, bfloat16 layers are decoded for cuBLAS; by the count of instructions, not yet measured.
MANY_TOKENS = 256
DENSE_WEIGHTS = 1 << 26  # decoded at a time then: 128 MB
GRAD_COEFS: Config = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4}
GRAD_PARTS = 8  # parts of the columns whose sums stay apart
MIX: Config = {"BLOCK": 16, "num_warps": 8}
# A product for few tokens is split along the input into so many programs, four for each of an H100's cores.
ENOUGH_PROGRAMS = 528


@cache
def architecture(device: torch.device) -> str:
    """Return a GPU's architecture, as compilers call it."""
    properties = torch.cuda.get_device_properties(device)
    if is_nvidia(device):
        return f"sm_{properties.major}{properties.minor}"
    return str(properties.gcnArchName).split(":")[0]


def fixed(kernel: str, device: torch.device) -> Config | None:
    """Return the configuration of a kernel where it needs no search."""
    if device.type != "cuda":
        return CANDIDATES[kernel][0]
    return TUNED.get(architecture(device), {}).get(kernel)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a device current: Triton launches kernels there, whatever device their arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def tokens_bucket(tokens: int) -> int:
    """Round a count of tokens up to a power of two, with which it shares a configuration; from 1024 on all share one."""
    return min(1024, 1 << (tokens - 1).bit_length())


def is_nvidia(device: torch.device) -> bool:
    """Return whether a device has NVIDIA's own instructions."""
    return device.type == "cuda" and torch.version.hip is None


def precision(device: torch.device) -> str:
    """Say how float32 is multiplied on tensor cores without loss: in three parts where that is faster."""
    return "tf32x3" if is_nvidia(device) else "ieee"


def trellis_few_tokens(tokens: int) -> str:
    """Return the kernel's name for the trellis and few tokens."""
    return "trellis_1_token" if tokens <= 2 else "trellis_few_tokens"


def matmul(operand: Tensor, heavy: bool) -> str:
    """Return the kernel's name for products on tensor cores, by the operand's dtype and by what a tile of the weight takes."""
    return "matmul_single" if operand.dtype != torch.float16 else "matmul_heavy" if heavy else "matmul_half"


def trellis_walk(symbol_bits: int, survivors: int, device: torch.device) -> dict[str, Any]:
    """Configure the trellis's search: states of a tile, predecessors in straight code, and registers that need no spilling."""
    block = min(1 << survivors, 1 << 12)
    config = {"BLOCK": block, "UNROLLED": min(1 << symbol_bits, 8), "num_stages": 1}
    config["num_warps"] = max(1, min(8, block // 512))
    return config | ({"maxnreg": 128} if is_nvidia(device) else {})


def seedlm_energies(block: int, rank: int) -> dict[str, Any]:
    """Configure the bound of SeedLM's search: places of a block padded for tensor cores, seeds and blocks of a tile."""
    places = max(16, 1 << (block - 1).bit_length())
    stages = 3 if rank * places * 64 * 2 * 3 <= 48 << 10 else 1  # of tables in shared memory
    blocks = 64 if places <= 32 else 16
    return {"PLACES": places, "BLOCK_S": 64, "BLOCK_B": blocks, "num_warps": 4, "num_stages": stages}


def programs(device: torch.device, jobs: int, warps: int, scratch_bytes: int) -> int:
    """Return how many programs share some jobs: as many as run at a time, if their scratch takes at most four fifths of the free memory."""
    if device.type != "cuda":
        return min(jobs, 2)
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(jobs, cores * (16 // warps), free * 4 // 5 // scratch_bytes))
