"""Products with a SeedLM weight straight from its seeds and codes; see `reference`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from seedpack.kernels.common import row_tiles as tiles
from seedpack.kernels.dispatch import Backend, choose
from seedpack.kernels.seedlm.decode import seedlm_decode, unable

BACKENDS = ("cpu", "triton", "reference")


def seedlm_matmul(
    x: Tensor, seeds: Tensor, codes: Tensor, exponent_bias: Tensor, *, seed_bits: int, block: int, rank: int,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """x [tokens, columns] times the weight [rows, columns] transposed, in the dtype of x; parts as for `seedlm_decode`."""
    sizes = (seed_bits, block, rank)
    chosen = choose("seedlm_matmul", backend, x.device, BACKENDS, unable(*sizes))
    if chosen == "cpu" and x.shape[0] > tiles.FEW_TOKENS:
        return tiles.matmul(x, seeds.shape[0], _tiles(seeds, codes, exponent_bias, *sizes, x.shape[1]))
    return _kernels(chosen).matmul(x, seeds, codes, exponent_bias, *sizes)  # type: ignore[no-any-return]


def seedlm_matmul_transposed(
    grad: Tensor, seeds: Tensor, codes: Tensor, exponent_bias: Tensor, *, seed_bits: int, block: int, rank: int,
    columns: int, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """grad [tokens, rows] times the weight [rows, columns]: the gradient to x."""
    sizes = (seed_bits, block, rank)
    chosen = choose("seedlm_matmul", backend, grad.device, BACKENDS, unable(*sizes))
    if chosen == "cpu":
        return tiles.matmul_transposed(grad, columns, _tiles(seeds, codes, exponent_bias, *sizes, columns))
    return _kernels(chosen).matmul_transposed(grad, seeds, codes, exponent_bias, *sizes, columns)  # type: ignore[no-any-return]


def _kernels(chosen: str) -> Any:
    return import_module(f"seedpack.kernels.seedlm.matmul_{chosen}")


def _tiles(
    seeds: Tensor, codes: Tensor, exponent_bias: Tensor, seed_bits: int, block: int, rank: int, columns: int
) -> tiles.Tile:
    return lambda rows: seedlm_decode(
        seeds[rows], codes[rows], exponent_bias,
        seed_bits=seed_bits, block=block, rank=rank, columns=columns, dtype=torch.float32, backend="cpu",
    )  # fmt: skip
