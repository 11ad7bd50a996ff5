from __future__ import annotations

from typing import Any

import pytest
import torch

from seedpack.codecs.base import Codec
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.mask import MaskCodec
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.registry import get_codec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.stack import StackCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.errors import CodecError
from seedpack.image.codec import FieldCodec
from tests.helpers.codecs import check_config, check_contract, check_hessian, check_refusals

SMALL = SeedLMCodec(10, 8, 3)
CODECS = [
    SVDCodec(rank=4),
    SVDCodec(rank=7, levels=3),
    SVDCodec(bits=5.0),
    SVDCodec.over(SMALL, rank=9),
    SVDCodec.over(SMALL, bits=4.0),
]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shape", [(32, 48), (48, 31), (5, 3)], ids=str)
def test_contract(codec: SVDCodec, shape: tuple[int, int]) -> None:
    check_contract(codec, torch.randn(shape))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_config_and_refusals(codec: SVDCodec) -> None:
    check_config(codec)
    check_refusals(codec, torch.randn(32, 48))


@pytest.mark.parametrize("bits", [1.0, 4.0, 12.8])
@pytest.mark.parametrize("factors", [None, SMALL], ids=["fp16", "seedlm"])
def test_bits_are_the_largest_that_fit(bits: float, factors: SeedLMCodec | None) -> None:
    codec = SVDCodec(bits=bits) if factors is None else SVDCodec.over(factors, bits=bits)
    shape = (96, 160)
    rank = codec.rank_of(shape)
    assert codec.bits_per_weight(shape) <= bits
    more = SVDCodec(rank=rank + 1, factors=codec.factors)
    assert rank == 96 or more.bits_per_weight(shape) > bits


def test_full_rank_is_fp16_rounding() -> None:
    weight = torch.randn(24, 40)
    codec = SVDCodec(rank=1000)
    decoded = codec.decode(codec.encode(weight), (24, 40), torch.float32)
    assert float((decoded - weight).norm() / weight.norm()) < 1e-3


def test_importance() -> None:
    weight, importance = torch.randn(64, 48), torch.rand(48) * 10 + 0.01
    codec = SVDCodec(rank=16)
    plain, weighted = (codec.decode(codec.encode(weight, h), (64, 48), torch.float32) for h in (None, importance))
    before, after = ((importance * (w - weight) ** 2).sum() for w in (plain, weighted))
    assert after < 0.95 * before


def test_hessians() -> None:
    for codec in (
        SVDCodec(rank=20),
        SVDCodec.over(SMALL, rank=20),
        SVDCodec.over(TrellisCodec(4, effort="fast"), rank=20),
    ):
        check_hessian(codec, 0.5)
    assert SVDCodec.over(TrellisCodec(), rank=2).with_hessian().factors["config"]["circular"] is False  # type: ignore[index]


def test_settings() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "either rank or bits"),
        ({"rank": 3, "bits": 4.0}, "either rank or bits"),
        ({"rank": 0}, "rank must be a whole number"),
        ({"bits": 0.0}, "bits must be above 0"),
        ({"rank": 3, "factors": {"id": "raw"}}, "factors must be a codec's id, version and config"),
        ({"rank": 3, "factors": SVDCodec(rank=2).spec().to_json()}, "cannot be svd again"),
    ]
    for settings, message in wrong:
        with pytest.raises(CodecError, match=message):
            get_codec("svd")(**settings)


def test_first_levels_are_a_smaller_rank() -> None:
    weight, shape = torch.randn(30, 40), (30, 40)
    whole, half = SVDCodec(rank=10, levels=5, oversampling=30), SVDCodec(rank=4, oversampling=30)
    parts = whole.encode(weight)
    first = {name: parts[name] for name in ("weight", "right", "more_1", "right_more_1")}
    whole.check(first, shape)
    expected = half.decode(half.encode(weight), shape, torch.float32)
    torch.testing.assert_close(whole.decode(first, shape, torch.float32), expected, rtol=0.02, atol=0.02)
    x = torch.randn(3, 40)
    torch.testing.assert_close(whole.matmul(x, first, shape), x @ whole.decode(first, shape, torch.float32).T)
    del parts["more_1"]
    with pytest.raises(CodecError, match="expected parts"):
        whole.check(parts, shape)


@pytest.mark.parametrize("inner", [BasisCodec(count=7), MaskCodec(0.4), SMALL, TrellisCodec(2, effort="fast")], ids=str)
def test_rows_of_any_factors(inner: Codec) -> None:
    """An embedding's rows come from factors whose codec has no rows of its own, too."""
    codec, shape, index = SVDCodec.over(inner, rank=6), (20, 24), torch.tensor([19, 0, 7, 7])
    parts = codec.encode(torch.randn(shape))
    expected = codec.decode(parts, shape, torch.float32)[index]
    torch.testing.assert_close(codec.decode_rows(parts, index, shape, torch.float32), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inner", [RawCodec("I32"), StackCodec.over(SMALL, 4, 8), FieldCodec(sizes=(0,) * 4)], ids=str)
def test_factors_that_are_no_matrices(inner: Codec) -> None:
    with pytest.raises(CodecError, match=f"factors cannot be {inner.id}; name a codec of single matrices"):
        SVDCodec.over(inner, rank=6)
