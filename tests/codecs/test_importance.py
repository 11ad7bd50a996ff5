from __future__ import annotations

import pytest
import torch

from seedpack.codecs.importance import DAMPING, Importance
from seedpack.errors import CodecError


def hessian(columns: int = 6) -> torch.Tensor:
    x = torch.randn(40, columns)
    return x.T @ x / 40


def test_kinds() -> None:
    none, channels, full = Importance.of(None), Importance.of(torch.ones(4)), Importance.of(torch.eye(4))
    assert none.is_none and not none and channels and full
    assert [importance.has_hessian for importance in (none, channels, full)] == [False, False, True]
    assert Importance.of(full) is full and none.per_channel() is none and channels.per_channel() is channels
    assert torch.equal(full.per_channel().diagonal(), torch.ones(4, dtype=torch.float64))


def test_channels_have_mean_one_and_are_off_zero() -> None:
    weights = Importance(torch.tensor([0.0, 1.0, 3.0])).channel_weights()
    assert weights.tolist() == [1e-6, 0.75, 2.25]
    h = hessian()
    expected = h.diagonal().double() / h.diagonal().double().mean() + DAMPING
    assert torch.equal(Importance(h).diagonal(damped=True), expected)
    torch.testing.assert_close(Importance(h).channel_weights(), expected / expected.mean())


def test_a_hessian_is_damped_and_padded() -> None:
    h = hessian()
    importance = Importance(h)
    damped = importance.damped(padding=2)
    expected = h.double() / h.diagonal().double().mean() + DAMPING * torch.eye(6, dtype=torch.float64)
    assert torch.equal(damped[:6, :6], expected) and torch.equal(damped[6:], torch.eye(8, dtype=torch.float64)[6:])
    factor = importance.cholesky(torch.device("cpu"), padding=2)
    torch.testing.assert_close(factor @ factor.mT, damped)
    assert torch.equal(factor, factor.tril())


def test_through_a_matrix() -> None:
    x, matrix = torch.randn(50, 6), torch.randn(3, 6)
    after = x @ matrix.T
    expected = (after.T @ after / 50).double()
    torch.testing.assert_close(Importance(x.T @ x / 50).through(matrix).values, expected, rtol=1e-4, atol=1e-5)


def test_what_never_came_in_does_not_count() -> None:
    assert Importance(torch.zeros(3, 3)).zero_as_none().is_none
    for importance in (Importance(torch.eye(3)), Importance(torch.zeros(3)), Importance()):
        assert importance.zero_as_none() is importance


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(5), "one value for each of 4 input channels, got shape"),
        (torch.ones(4, 4, 4), "one value for each of 4 input channels, got shape"),
        (torch.tensor([1.0, -1.0, 1.0, 1.0]), "must be finite, not negative, and not all zero"),
        (torch.zeros(4), "must be finite, not negative, and not all zero"),
        (torch.full((4,), torch.nan), "must be finite, not negative, and not all zero"),
        (torch.eye(5), r"a Hessian of 4 input channels has shape \[4, 4\], got \[5, 5\]"),
        (torch.zeros(4, 4), "a Hessian must be finite, and its diagonal positive"),
        (torch.full((4, 4), torch.inf), "a Hessian must be finite, and its diagonal positive"),
    ],
)
def test_refusals(values: torch.Tensor, message: str) -> None:
    with pytest.raises(CodecError, match=f"some-codec: .*{message}"):
        Importance(values).require("some-codec", 4)
