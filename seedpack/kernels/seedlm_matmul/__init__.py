"""Products with a SeedLM weight straight from its seeds and codes; see `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack.kernels import tiles
from seedpack.kernels.dispatch import Backend, choose
from seedpack.kernels.seedlm_decode import seedlm_decode
from seedpack.kernels.seedlm_matmul import reference

BACKENDS = ("cpu", "reference")


def seedlm_matmul(
    x: Tensor, seeds: Tensor, codes: Tensor, exponent_bias: Tensor, *, seed_bits: int, block: int, rank: int,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """x [tokens, columns] times the weight [rows, columns] transposed, in the dtype of x; parts as for `seedlm_decode`."""
    sizes = (seed_bits, block, rank)
    if choose("seedlm_matmul", backend, x.device, BACKENDS) == "cpu":
        from seedpack.kernels.seedlm_decode.cpu import LARGEST

        if x.shape[0] <= tiles.FEW_TOKENS and block * rank <= LARGEST:
            from seedpack.kernels.seedlm_matmul import cpu

            return cpu.matmul(x, seeds, codes, exponent_bias, *sizes)
        return tiles.matmul(x, seeds.shape[0], _tiles(seeds, codes, exponent_bias, *sizes, x.shape[1]))
    return reference.matmul(x, seeds, codes, exponent_bias, *sizes)


def seedlm_matmul_transposed(
    grad: Tensor, seeds: Tensor, codes: Tensor, exponent_bias: Tensor, *, seed_bits: int, block: int, rank: int,
    columns: int, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """grad [tokens, rows] times the weight [rows, columns]: the gradient to x."""
    sizes = (seed_bits, block, rank, columns)
    if choose("seedlm_matmul", backend, grad.device, BACKENDS) == "cpu":
        return tiles.matmul_transposed(grad, columns, _tiles(seeds, codes, exponent_bias, *sizes))
    return reference.matmul_transposed(grad, seeds, codes, exponent_bias, *sizes)


def _tiles(
    seeds: Tensor, codes: Tensor, exponent_bias: Tensor, seed_bits: int, block: int, rank: int, columns: int
) -> tiles.Tile:
    return lambda rows: seedlm_decode(
        seeds[rows], codes[rows], exponent_bias,
        seed_bits=seed_bits, block=block, rank=rank, columns=columns, dtype=torch.float32, backend="cpu",
    )  # fmt: skip
