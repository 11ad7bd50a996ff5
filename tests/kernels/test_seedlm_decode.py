"""Reference and CPU kernel, bit for bit; the reference against the definition in Python's integers."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from seedpack.kernels.common.bits import pack
from seedpack.kernels.seedlm.code import SeedLMCode, SeedLMParts
from seedpack.kernels.seedlm.decode import seedlm_decode
from seedpack.prng import lfsr_matrix
from tests.helpers.marks import slow


def random_parts(rows: int, columns: int, code: SeedLMCode) -> SeedLMParts:
    blocks = -(-columns // code.block)
    codes = torch.randint(-8, 8, (rows, blocks * (code.rank + 1)))
    if blocks * (code.rank + 1) % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    seeds = pack(torch.randint(1, 2**code.seed_bits, (rows, blocks)), code.seed_bits)
    return SeedLMParts(seeds, pack(codes, 4), torch.randint(-20, 20, (1,), dtype=torch.int8))


SETTINGS = [(16, 8, 3), (5, 7, 5), *slow((16, 12, 4), (2, 3, 2), (11, 5, 1), (17, 6, 2), (20, 6, 6), (24, 9, 4))]


@pytest.mark.parametrize(("seed_bits", "block", "rank"), SETTINGS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (17, 96), (2, 501)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_backends_agree_bit_for_bit(
    seed_bits: int, block: int, rank: int, shape: tuple[int, int], dtype: torch.dtype, poison: None
) -> None:
    code = SeedLMCode(seed_bits, block, rank)
    parts = random_parts(*shape, code)
    expected = seedlm_decode(parts, code, columns=shape[1], dtype=dtype, backend="reference")
    found = seedlm_decode(parts, code, columns=shape[1], dtype=dtype, backend="cpu")
    assert found.shape == shape and found.dtype == dtype
    assert torch.equal(found, expected)
    wide = parts._replace(
        **{name: torch.stack((p, p), -1)[..., 0] for name, p in parts._asdict().items() if p.dim() > 1}
    )
    assert not wide.seeds.is_contiguous() or wide.seeds.numel() == 1
    assert torch.equal(seedlm_decode(wide, code, columns=shape[1], dtype=dtype, backend="cpu"), expected)


@pytest.mark.parametrize(("seed_bits", "block", "rank"), [(16, 8, 3), (5, 7, 5), (24, 9, 4)])
def test_definition(seed_bits: int, block: int, rank: int) -> None:
    seed, exponent, bias = 2**seed_bits // 3, -3, 4
    mantissa = [(-8, 7, 3, -1, 0)[p % 5] for p in range(rank)]
    parts = SeedLMParts(
        pack(torch.tensor([[seed]]), seed_bits),
        pack(torch.tensor([[exponent, *mantissa] + [0] * ((rank + 1) % 2)]), 4),
        torch.tensor([bias], dtype=torch.int8),
    )
    code = SeedLMCode(seed_bits, block, rank)
    found = seedlm_decode(parts, code, columns=block, dtype=torch.float32, backend="reference")
    half = 2 ** (seed_bits - 1)
    matrix = lfsr_matrix(seed, seed_bits, block, rank)
    for c in range(block):
        exact = sum(Fraction(int(matrix[c, p]) - half, half - 1) * mantissa[p] for p in range(rank))
        assert float(found[0, c]) == pytest.approx(float(exact * Fraction(2) ** (exponent + bias)), rel=3e-7)
