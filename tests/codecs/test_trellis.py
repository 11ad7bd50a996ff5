from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from seedpack.codecs.importance import Importance
from seedpack.codecs.registry import codec_from_spec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.errors import CodecError, VersionError
from seedpack.formats import CodecSpec
from tests.helpers.codecs import check_config, check_contract, check_hessian, check_refusals
from tests.helpers.marks import slow_but

CODECS = [
    TrellisCodec(4, effort="fast"),
    TrellisCodec(2, 12, seed=5, effort="fast"),
    TrellisCodec(6, effort="fast"),
    TrellisCodec(2.5, effort="fast"),
]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shape", [(3, 40), (5, 3), (1, 8), (130, 37), (200, 96)], ids=str)
def test_contract(codec: TrellisCodec, shape: tuple[int, int]) -> None:
    check_contract(codec, torch.randn(shape))


def test_hessians() -> None:
    check_hessian(TrellisCodec(2, effort="fast"), 0.6)
    check_hessian(TrellisCodec(4, effort="fast", balance=False), 0.6)
    with pytest.raises(CodecError, match="a Hessian is for streams with circular=false"):
        TrellisCodec().encode(torch.randn(8, 16), torch.eye(16))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_config_and_refusals(codec: TrellisCodec) -> None:
    check_config(codec)
    check_refusals(codec, torch.randn(32, 48))


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e4, 1e30])
def test_any_scale(scale: float) -> None:
    weight = torch.randn(16, 256)
    codec = TrellisCodec(4, effort="fast")
    shape = (16, 256)
    plain = codec.decode(codec.encode(weight), shape, torch.float32)
    scaled = codec.decode(codec.encode(weight * scale), shape, torch.float32)
    error = float((scaled / scale - weight).norm() / (plain - weight).norm())
    assert error == pytest.approx(1, abs=0.01)


def test_zero_rows_and_zero_weights() -> None:
    weight = torch.randn(130, 64)
    weight[3] = 0
    codec = TrellisCodec(4, effort="fast")
    decoded = codec.decode(codec.encode(weight), (130, 64), torch.float32)
    assert not decoded[3].any() and float((decoded - weight).norm() / weight.norm()) < 0.12
    assert not codec.decode(codec.encode(weight * 0), (130, 64), torch.float32).any()


def test_importance_moves_the_error() -> None:
    weight, importance = torch.randn(256, 64), torch.rand(64) ** 4 + 1e-3
    codec = TrellisCodec(3, effort="fast")

    def loss(h: torch.Tensor | None) -> float:
        decoded = codec.decode(codec.encode(weight, h), (256, 64), torch.float32)
        return float((importance * (decoded - weight) ** 2).sum())

    assert loss(importance) < 0.8 * loss(torch.ones(64))
    with pytest.raises(CodecError, match="one value for each of 64 input channels"):
        codec.encode(weight, torch.ones(3))


def test_guess() -> None:
    weight = torch.randn(32, 8) * torch.logspace(-2, 2, 8)
    guess = Importance.from_norms(weight).diagonal()
    assert bool((guess[:-1] > guess[1:]).all())
    assert torch.equal(Importance.from_norms(weight, torch.full((8,), 2.0)).diagonal(), 2 * guess)
    assert torch.equal(Importance.from_norms(weight * 0).diagonal(), torch.ones(8, dtype=torch.float64))


def test_balance_is_stored_where_it_is_cheap() -> None:
    codec = TrellisCodec(4)
    assert "balance" not in TrellisCodec(4, balance=False).parts((4096, 64))
    assert "balance" not in codec.parts((127, 64)) and codec.parts((128, 64))["balance"] == ("U8", (1, 32, 1))
    assert codec.bits_per_weight((4096, 4096)) == 4 + 16 / 4096 + 4 / 4096 + 8 / 4096**2


@pytest.mark.parametrize("code_bits", slow_but([2, 4], range(1, 9)))
def test_error_falls_by_six_decibels_a_bit(code_bits: int) -> None:
    codec = TrellisCodec(code_bits, effort="fast")
    weight = torch.randn(8, 512)
    decoded = codec.decode(codec.encode(weight), (8, 512), torch.float32)
    error = float((decoded - weight).square().sum() / weight.square().sum())
    gap = 10 * math.log10(error * 4**code_bits)
    expected = 10 * math.log10(codec.expected_error() * 4**code_bits)  # with the default effort
    assert -1.5 < gap - expected < 2.5  # at high rates rare large values decide


def test_efforts() -> None:
    assert [TrellisCodec(4, effort=e).survivors for e in ("fast", "default", "best")] == [7, 11, 14]
    assert TrellisCodec(4, effort="best").state_bits == 18 and TrellisCodec(4, 16, effort="best").survivors == 12
    assert [TrellisCodec(2, effort=e).survivors for e in ("fast", "default", "best")] == [10, 12, 16]
    assert [TrellisCodec(3, effort=e).weights_per_window for e in ("fast", "default", "best")] == [2, 2, 1]
    assert TrellisCodec(8).survivors == 8 and TrellisCodec(1, 20, effort="fast").survivors == 10
    weight = torch.randn(6, 512)
    errors = []
    for effort in ("fast", "default"):
        codec = TrellisCodec(4, effort=effort)
        errors.append(float((codec.decode(codec.encode(weight), (6, 512), torch.float32) - weight).norm()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"code_bits": 0}, "code_bits must be a whole number from 1 to 8, or 1.5, 2.5 or 3.5, got 0"),
        ({"code_bits": 4.5}, "code_bits must be a whole number from 1 to 8, or 1.5, 2.5 or 3.5"),
        ({"code_bits": math.nan}, "code_bits must be a whole number from 1 to 8"),
        ({"code_bits": 2.5, "weights_per_window": 1}, "weights_per_window must be a whole number from 2 to 2"),
        ({"code_bits": 9}, "code_bits must be a whole number from 1 to 8"),
        ({"code_bits": True}, "code_bits must be a whole number"),
        ({"state_bits": 7}, "state_bits must be a whole number from 8 to 20"),
        ({"state_bits": 21}, "state_bits must be a whole number from 8 to 20"),
        ({"state_bits": False}, "state_bits must be a whole number"),
        ({"code_bits": 2, "weights_per_window": True}, "weights_per_window must be a whole number"),
        ({"code_bits": 4, "weights_per_window": 2}, "weights_per_window must be a whole number from 1 to 1"),
        (
            {"code_bits": 3, "state_bits": 11, "weights_per_window": 2},
            "state_bits must be a whole number from 12 to 20",
        ),
        ({"seed": -1}, "seed must be a whole number"),
        ({"effort": "most"}, "effort must be one of fast, default, best, got 'most'"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        TrellisCodec(**settings)


def test_bits() -> None:
    assert TrellisCodec.from_bits(3.0) == TrellisCodec(3) and TrellisCodec.from_bits(3.5) == TrellisCodec(3)
    assert TrellisCodec.from_bits(2.0, effort="best") == TrellisCodec(2, 20, effort="best")
    assert [codec.bits_per_weight((64, 64)) for codec in TrellisCodec(4).variants()] == [
        k + 16 / 64 + 8 / 64**2 for k in (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
    ]
    for bits in (0.5, 8.5, 0.0, math.inf):
        with pytest.raises(CodecError, match="must be from 1 to 8"):
            TrellisCodec.from_bits(bits)


def test_corrupt_parts_are_refused() -> None:
    codec = TrellisCodec(4, effort="fast")
    parts = codec.encode(torch.randn(4, 32))
    nan = torch.tensor([0x7E00, 0, 0, 0], dtype=torch.int16)
    with pytest.raises(CodecError, match="a scale is not finite"):
        codec.check({**parts, "scales": nan}, (4, 32))
    with pytest.raises(CodecError, match=r"exponent 120 is not in -100 … 100"):
        codec.check({**parts, "exponent": torch.tensor([120], dtype=torch.int8)}, (4, 32))


@pytest.mark.parametrize(("code_bits", "state_bits"), [(5, 9), (6, 11), (7, 13), (8, 15)])
def test_states_hold_a_symbol_and_as_much_memory(code_bits: int, state_bits: int) -> None:
    with pytest.raises(CodecError, match=f"state_bits must be a whole number from {2 * code_bits} to 20"):
        TrellisCodec(code_bits, state_bits)
    assert [variant.state_bits for variant in TrellisCodec(1, 9).variants()] == [9, 9, 9, 10, 9, 14, 9, 10, 12, 14, 16]
    assert [variant.weights_per_window for variant in TrellisCodec(1, 9).variants()] == [
        2,
        2,
        2,
        2,
        1,
        2,
        1,
        1,
        1,
        1,
        1,
    ]
    paired = TrellisCodec(3, 9, weights_per_window=1).variants()  # what is not usual stays so
    assert [variant.weights_per_window for variant in paired[:4]] == [1, 1, 1, 1]


def test_a_multiplier_of_its_own() -> None:
    """Version 2 knows one; a codec that has the format's is written as ever."""
    codec = TrellisCodec(4)
    assert codec.multiplier and codec.spec().version == 2 and codec_from_spec(codec.spec()) == codec
    assert codec.code.multiplier == codec.multiplier != TrellisCodec(4, multiplier=0).code.multiplier
    plain = TrellisCodec(4, multiplier=0)
    assert plain.spec().version == 0 and "multiplier" not in plain.spec().config
    assert TrellisCodec(6).multiplier == 0 and [v.multiplier for v in codec.variants()][6:9:2] == [codec.multiplier, 0]
    assert {v.multiplier for v in plain.variants()} == {0} and TrellisCodec(4, 18).multiplier == 0
    weight = torch.randn(4, 256)
    other = TrellisCodec(3, multiplier=0x12345679)
    decoded = other.decode(other.encode(weight), (4, 256), torch.float32)
    assert float((decoded - weight).square().sum() / weight.square().sum()) < 0.03
    for wrong, message in (
        (2, "multiplier must be odd, or 0, got 2"),
        (2**32 + 1, "multiplier must be a whole number"),
    ):
        with pytest.raises(CodecError, match=message):
            TrellisCodec(4, multiplier=wrong)


def test_half_bits() -> None:
    """They have two weights per window, version 3, and rows that are padded to 16 weights."""
    codec = TrellisCodec(2.5)
    assert codec.spec().version == 3 and codec_from_spec(codec.spec()) == codec and codec.weights_per_window == 2
    assert codec.bits_per_weight((64, 4096)) == 2.5 + 16 / 4096 + 8 / (64 * 4096)
    assert codec.parts((4, 24))["weight"] == ("U8", (4, 2, 5))
    whole = TrellisCodec(2.0)
    assert whole == TrellisCodec(2) and type(whole.code_bits) is int and whole.spec().version == 1
    errors = [v.expected_error() for v in codec.variants()]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(VersionError, match="the file has version 1, but its settings are of version 3"):
        codec_from_spec(CodecSpec("trellis", 1, codec.spec().config))


def test_one_weight_per_window_is_read_and_written_as_ever() -> None:
    """Version 0 knew no other, and no such setting."""
    old = CodecSpec(
        "trellis", 0, {"code_bits": 2, "state_bits": 16, "seed": 0, "effort": "fast", "balance": True, "circular": True}
    )
    codec = codec_from_spec(old)
    assert codec == TrellisCodec(2, effort="fast", weights_per_window=1) and codec.spec() == old
    new = TrellisCodec(2, effort="fast")
    assert new.spec().version == 1 and codec_from_spec(new.spec()) == new
    with pytest.raises(VersionError, match="the file has version 0, but its settings are of version 1"):
        codec_from_spec(CodecSpec("trellis", 0, new.spec().config))
