from __future__ import annotations

import pytest
import torch

from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.errors import CodecError
from tests.helpers.codecs import check_config, check_contract, check_hessian, check_refusals
from tests.helpers.marks import slow

CODECS = [
    SeedLMCodec(10, 8, 3),
    *slow(SeedLMCodec(9, 12, 4), SeedLMCodec(8, 4, 2)),
    SeedLMCodec(7, 5, 1, 1),
    *slow(SeedLMCodec(11, 6, 6)),
]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shape", [(16, 24), (5, 37), (1, 3), (3, 1)], ids=str)
def test_contract(codec: SeedLMCodec, shape: tuple[int, int]) -> None:
    check_contract(codec, 0.02 * torch.randn(shape))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_config_and_refusals(codec: SeedLMCodec) -> None:
    check_config(codec)
    check_refusals(codec, torch.randn(4, 24))


@pytest.mark.parametrize(("bits", "columns"), [(4.0, 4096), (3.0, 12 * 300)])
def test_bits_of_the_paper(bits: float, columns: int) -> None:
    codec, shape = SeedLMCodec.from_bits(bits), (64, columns)
    assert codec.bits_per_weight(shape) == pytest.approx(bits + 8 / (64 * columns), abs=1e-12)  # and one byte


def test_padding_is_counted() -> None:
    assert SeedLMCodec().bits_per_weight((4, 9)) == (4 * 2 * 32 + 8) / 36


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 1e4, 1e30])
def test_error_does_not_depend_on_the_scale(scale: float) -> None:
    codec = SeedLMCodec(12, 8, 3)
    weight = torch.randn(8, 64)
    decoded = codec.decode(codec.encode(weight * scale), (8, 64), torch.float32) / scale
    reference = codec.decode(codec.encode(weight), (8, 64), torch.float32)
    error, expected = (float((w - weight).norm() / weight.norm()) for w in (decoded, reference))
    assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "weight", [torch.zeros(3, 16), torch.full((3, 16), 1e-42), torch.eye(16)], ids=["0", "denormal", "eye"]
)
def test_odd_values(weight: torch.Tensor) -> None:
    codec = SeedLMCodec(12, 8, 3)
    decoded = codec.decode(codec.encode(weight), (*weight.shape,), torch.float32)
    assert torch.isfinite(decoded).all() and float((decoded - weight).norm()) <= float(weight.norm())
    assert torch.equal(decoded[weight.abs().sum(1) == 0], weight[weight.abs().sum(1) == 0])


def test_importance_moves_error_to_where_it_matters_least() -> None:
    codec, weight = SeedLMCodec(12, 8, 3), torch.randn(64, 32)
    importance = torch.rand(32) * 10 + 0.01
    plain, weighted = (codec.decode(codec.encode(weight, h), (64, 32), torch.float32) for h in (None, importance))
    before, after = ((importance * (w - weight) ** 2).sum() for w in (plain, weighted))
    assert after < 0.85 * before
    same = codec.encode(weight, torch.full((32,), 7.0))
    assert all(torch.equal(a, b) for a, b in zip(same.values(), codec.encode(weight).values(), strict=True))


@pytest.mark.parametrize("importance", [torch.ones(31), -torch.ones(32), torch.zeros(32), torch.full((32,), torch.nan)])
def test_wrong_importance(importance: torch.Tensor) -> None:
    with pytest.raises(CodecError, match="importance must"):
        SeedLMCodec(8, 4, 2).encode(torch.randn(2, 32), importance)


def test_hessians() -> None:
    check_hessian(SeedLMCodec(10, 8, 3), 0.8)
    check_hessian(SeedLMCodec(9, 5, 1), 0.8)  # padded


def test_settings_out_of_range() -> None:
    for settings, message in [
        ({"seed_bits": 25}, "seed_bits must be a whole number from 2 to 24, got 25"),
        ({"rank": 9}, "rank must be a whole number from 1 to 8"),
        ({"exponents": 2}, "exponents must be 1 or 3"),
    ]:
        with pytest.raises(CodecError, match=message):
            SeedLMCodec(**settings)
    with pytest.raises(CodecError, match="5 bits: the paper gives configurations for 3 and 4"):
        SeedLMCodec.from_bits(5.0)


def test_exponent_bias_out_of_range() -> None:
    codec = SeedLMCodec(8, 8, 3)
    parts = codec.encode(torch.randn(2, 8))
    parts["exponent_bias"][0] = -128
    with pytest.raises(CodecError, match="exponent bias -128 is not in"):
        codec.check(parts, (2, 8))


def test_small_weights_are_rebuilt_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel takes seconds to compile for each of the settings, of which a small file can name hundreds."""
    weight, index = torch.randn(12, 40), torch.tensor([3, 0])
    codec = SeedLMCodec(9, 5, 2)
    parts = codec.encode(weight)
    rows = codec.decode_rows(parts, index, (12, 40), torch.float32)
    monkeypatch.setattr("seedpack.kernels.seedlm.decode_cpu.decode", lambda *_: pytest.fail("compiled"))
    decoded = codec.decode(parts, (12, 40), torch.float32)
    assert torch.equal(decoded[index], rows)
