"""The search against brute force over all seeds in float64."""

from __future__ import annotations

from itertools import product

import numba
import pytest
import torch

from seedpack.kernels.dispatch import Backend
from seedpack.kernels.seedlm.code import SeedLMCode
from seedpack.kernels.seedlm.search import BlockFits, seedlm_search
from seedpack.kernels.seedlm.search_reference import all_bases
from seedpack.prng import lfsr_position
from tests.helpers.marks import slow_but


def same_error(found: BlockFits, expected: BlockFits) -> None:
    torch.testing.assert_close(found.error, expected.error, rtol=1e-9, atol=1e-13)


def reconstruct(found: BlockFits, code: SeedLMCode, bias: int) -> torch.Tensor:
    position = torch.from_numpy(lfsr_position(code.seed_bits).copy())[found.seed].long()
    u = all_bases(code)[position]
    return (
        torch.einsum("ncp,np->nc", u, found.mantissa.double()) * torch.exp2((found.exponent + bias).double())[:, None]
    )


SIZES = [
    (16, 8, 3, 400), (16, 12, 4, 300), (12, 8, 3, 200), (9, 4, 2, 200), (7, 6, 6, 100), (3, 4, 2, 50), (5, 1, 1, 50),
    (13, 7, 5, 100), (4, 16, 16, 40), (3, 8, 8, 40),
]  # fmt: skip
DEFAULT = [
    ("cpu", 1, 9, 4, 2, 200), ("cpu", 1, 7, 6, 6, 100), ("cpu", 3, 12, 8, 3, 200),
    ("triton", 1, 9, 4, 2, 200), ("triton", 3, 5, 1, 1, 50), ("triton", 3, 7, 6, 6, 100),
]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "exponents", "seed_bits", "block", "rank", "count"),
    slow_but(
        DEFAULT,
        ((backend, exponents, *size) for backend in ("cpu", "triton") for exponents in (1, 3) for size in SIZES),
    ),
)
def test_exact(
    backend: Backend, exponents: int, seed_bits: int, block: int, rank: int, count: int, poison: None
) -> None:
    if exponents == 3:
        count //= 4
    code = SeedLMCode(seed_bits, block, rank)
    blocks = torch.randn(count, block) * torch.logspace(-4, 1, count)[:, None]
    expected = seedlm_search(blocks, None, -5, code, exponents=exponents, backend="reference")
    found = seedlm_search(blocks, None, -5, code, exponents=exponents, backend=backend)
    same_error(found, expected)
    fitted = reconstruct(found, code, -5)
    torch.testing.assert_close((blocks.double() - fitted).square().sum(1), found.error, rtol=1e-9, atol=1e-13)
    assert found.mantissa.min() >= -8 and found.mantissa.max() <= 7
    assert found.exponent.min() >= -8 and found.exponent.max() <= 7
    assert found.seed.min() >= 1 and found.seed.max() < 2**seed_bits


FACTORS = {
    "mild": torch.diag(torch.linspace(0.4, 1.1, 8)),
    "wild": torch.diag(torch.logspace(-3, 1, 8)[[3, 7, 0, 4, 1, 6, 2, 5]]),
    "triangular": torch.eye(8) + torch.arange(64.0).view(8, 8).sin().tril(-1) / 2,
    "nearly singular": torch.eye(8) * 0.01 + torch.arange(64.0).view(8, 8).cos().tril(),
}


@pytest.mark.parametrize(
    ("backend", "name"),
    [*product(["cpu"], FACTORS), *slow_but([("triton", "triangular")], product(["triton"], FACTORS))],
)
def test_exact_under_a_norm(backend: Backend, name: str) -> None:
    factor = FACTORS[name]
    blocks = torch.randn(60, 8)
    code = SeedLMCode(12, 8, 3)
    found = seedlm_search(blocks, factor, -5, code, exponents=3, backend=backend)
    same_error(found, seedlm_search(blocks, factor, -5, code, exponents=3, backend="reference"))
    error = (blocks.double() - reconstruct(found, code, -5)) @ factor.double()
    torch.testing.assert_close(error.square().sum(1), found.error, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_real_weights_and_extremes(backend: Backend) -> None:
    blocks = torch.cat(
        (torch.eye(8), torch.ones(2, 8), torch.zeros(3, 8), 1e6 * torch.randn(5, 8), torch.randn(5, 8) ** 5,
         1e-7 * torch.randn(5, 8), 1e-30 * torch.randn(2, 8))
    )  # fmt: skip
    code = SeedLMCode(14, 8, 3)
    found = seedlm_search(blocks, None, 2, code, exponents=1, backend=backend)
    same_error(found, seedlm_search(blocks, None, 2, code, exponents=1, backend="reference"))
    assert torch.all(found.error[10:13] == 0) and torch.all(found.mantissa[10:13] == 0)


def test_does_not_depend_on_threads_or_on_other_blocks() -> None:
    blocks = torch.randn(301, 8)

    def search(blocks: torch.Tensor) -> BlockFits:
        return seedlm_search(blocks, None, -5, SeedLMCode(13, 8, 3), exponents=3, backend="cpu")

    whole = search(blocks)
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = search(blocks)
    finally:
        numba.set_num_threads(threads)
    piece = search(blocks[100:133])
    for a, b, c in zip(whole, one, piece, strict=True):
        assert torch.equal(a, b) and torch.equal(a[100:133], c)


def test_paper_error_at_four_bits() -> None:
    blocks = torch.randn(4096, 8)
    found = seedlm_search(blocks, None, -5, SeedLMCode(16, 8, 3), exponents=1, backend="cpu")
    assert float(found.error.sum() / blocks.numel()) == pytest.approx(0.01511, rel=0.03)
