from __future__ import annotations

import pytest
import torch

from seedpack.errors import CodecError
from seedpack.linalg import captured_energy, effective_rank, randomized_svd, singular_values


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (7, 7), (1, 9)])
def test_full_rank_is_exact(shape: tuple[int, int]) -> None:
    a = torch.randn(shape)
    u, s, vh = randomized_svd(a, min(shape))
    torch.testing.assert_close((u * s) @ vh, a, rtol=0, atol=1e-5)
    torch.testing.assert_close(s, torch.linalg.svdvals(a), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 10, 64])
def test_error_is_near_optimal(rank: int) -> None:
    decay = torch.arange(1, 257).float().rsqrt()
    a = torch.linalg.qr(torch.randn(256, 256)).Q * decay @ torch.linalg.qr(torch.randn(256, 256)).Q
    u, s, vh = randomized_svd(a, rank, power_iterations=2)
    optimal = decay[rank:].square().sum().sqrt()
    assert float((a - (u * s) @ vh).norm() / optimal) <= 1.02
    assert torch.all(s[:-1] >= s[1:])
    torch.testing.assert_close(u.mT @ u, torch.eye(rank), rtol=0, atol=1e-5)


def test_repeatable_and_sign_fixed() -> None:
    a = torch.randn(30, 20)
    first, second = randomized_svd(a, 5, seed=3), randomized_svd(a, 5, seed=3)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    vh = first[2]
    assert torch.all(vh.gather(1, vh.abs().argmax(1, keepdim=True)) > 0)


def test_wrong_rank() -> None:
    with pytest.raises(CodecError, match="rank 21 of a 30x20 matrix: must be 1 to 20"):
        randomized_svd(torch.randn(30, 20), 21)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_singular_values(shape: tuple[int, int]) -> None:
    a = torch.randn(shape)
    torch.testing.assert_close(singular_values(a), torch.linalg.svdvals(a.double()))


def test_effective_rank_and_energy() -> None:
    assert effective_rank(torch.ones(8)) == pytest.approx(8)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    assert 1 < effective_rank(torch.tensor([3.0, 1.0])) < 2
    assert captured_energy(torch.tensor([2.0, 1.0]), 1) == pytest.approx(0.8)
