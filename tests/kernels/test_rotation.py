from __future__ import annotations

import pytest
import torch

from seedpack.kernels.rotation import rotate, unrotate
from seedpack.kernels.rotation.reference import factors

WIDTHS = [1, 2, 3, 27, 64, 144, 576, 1536, 4096, 11008, 3 * 1031]


@pytest.mark.parametrize("width", WIDTHS)
def test_rotation_is_orthogonal(width: int) -> None:
    x, y = torch.randn(3, width), torch.randn(2, 5, width)
    torch.testing.assert_close(unrotate(rotate(x, 1), 1), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotate(y, 1) @ rotate(x, 1).mT, y @ x.mT, rtol=1e-3, atol=1e-3 * width**0.5)
    assert rotate(x.half(), 1).dtype == torch.float32
    assert rotate(x[:0], 1).shape == (0, width)


@pytest.mark.parametrize("width", [w for w in WIDTHS if w < 3000 or w % 1031])
def test_one_channel_is_spread_over_all(width: int) -> None:
    x = torch.zeros(1, width)
    x[0, width // 2] = 1
    assert float(rotate(x, 3).abs().max()) <= 1.45 / width**0.5


def test_factors_multiply_to_the_width() -> None:
    for width in [*range(1, 200), 4099, 2 * 4099, 231 * 128, 1031 * 1033]:
        product = 1
        for factor in factors(width):
            product *= abs(factor)
        assert product == width
    assert factors(2 * 4099) == [2, -4099]


def test_signs_are_the_seed_s() -> None:
    x = torch.randn(1, 96)
    assert torch.equal(rotate(x, 5), rotate(x, 5)) and not torch.allclose(rotate(x, 5), rotate(x, 6))
