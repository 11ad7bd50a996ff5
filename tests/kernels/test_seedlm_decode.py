"""Reference and CPU kernel, bit for bit; the reference against the definition in Python's integers."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from seedpack.kernels.common.bits import pack
from seedpack.kernels.seedlm.decode import seedlm_decode
from seedpack.prng import lfsr_matrix
from tests.helpers.marks import slow


def random_parts(rows: int, columns: int, seed_bits: int, block: int, rank: int) -> dict[str, torch.Tensor]:
    blocks = -(-columns // block)
    codes = torch.randint(-8, 8, (rows, blocks * (rank + 1)))
    if blocks * (rank + 1) % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return {
        "seeds": pack(torch.randint(1, 2**seed_bits, (rows, blocks)), seed_bits),
        "codes": pack(codes, 4),
        "exponent_bias": torch.randint(-20, 20, (1,), dtype=torch.int8),
    }


SETTINGS = [(16, 8, 3), (5, 7, 5), *slow((16, 12, 4), (2, 3, 2), (11, 5, 1), (17, 6, 2), (20, 6, 6), (24, 9, 4))]


@pytest.mark.parametrize(("seed_bits", "block", "rank"), SETTINGS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (17, 96), (2, 501)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_backends_agree_bit_for_bit(
    seed_bits: int, block: int, rank: int, shape: tuple[int, int], dtype: torch.dtype, poison: None
) -> None:
    parts = random_parts(*shape, seed_bits, block, rank)
    settings = {"seed_bits": seed_bits, "block": block, "rank": rank, "columns": shape[1], "dtype": dtype}
    expected = seedlm_decode(**parts, **settings, backend="reference")  # type: ignore[arg-type]
    found = seedlm_decode(**parts, **settings, backend="cpu")  # type: ignore[arg-type]
    assert found.shape == shape and found.dtype == dtype
    assert torch.equal(found, expected)
    wide = {name: torch.stack((p, p), -1)[..., 0] if name != "exponent_bias" else p for name, p in parts.items()}
    assert not wide["seeds"].is_contiguous() or wide["seeds"].numel() == 1
    assert torch.equal(seedlm_decode(**wide, **settings, backend="cpu"), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(("seed_bits", "block", "rank"), [(16, 8, 3), (5, 7, 5), (24, 9, 4)])
def test_definition(seed_bits: int, block: int, rank: int) -> None:
    seed, exponent, bias = 2**seed_bits // 3, -3, 4
    mantissa = [(-8, 7, 3, -1, 0)[p % 5] for p in range(rank)]
    parts = (
        pack(torch.tensor([[seed]]), seed_bits),
        pack(torch.tensor([[exponent, *mantissa] + [0] * ((rank + 1) % 2)]), 4),
        torch.tensor([bias], dtype=torch.int8),
    )
    found = seedlm_decode(
        *parts,
        seed_bits=seed_bits,
        block=block,
        rank=rank,
        columns=block,
        dtype=torch.float32,
        backend="reference",
    )
    half = 2 ** (seed_bits - 1)
    matrix = lfsr_matrix(seed, seed_bits, block, rank)
    for c in range(block):
        exact = sum(Fraction(int(matrix[c, p]) - half, half - 1) * mantissa[p] for p in range(rank))
        assert float(found[0, c]) == pytest.approx(float(exact * Fraction(2) ** (exponent + bias)), rel=3e-7)
