from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from seedpack.codecs.base import Codec, matrix_shape
from seedpack.codecs.names import REGISTRY
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.registry import codec_from_spec, codec_ids, get_codec, register_codec
from seedpack.codecs.svd import SVDCodec
from seedpack.errors import CodecError, UnknownCodecError, VersionError
from seedpack.formats import CodecSpec
from tests.helpers.codecs import check_config, check_contract


def test_known_ids() -> None:
    assert codec_ids() == ["basis", "field", "mask", "raw", "seedlm", "stack", "svd", "trellis"]
    with pytest.raises(
        UnknownCodecError, match="unknown codec 'nope'; known: basis, field, mask, raw, seedlm, stack, svd"
    ):
        get_codec("nope")


def test_an_id_cannot_be_taken_twice() -> None:
    @dataclass(frozen=True)
    class Other(Codec):
        id: ClassVar[str] = "raw"
        version: ClassVar[int] = 1

    with pytest.raises(CodecError, match="codec id 'raw' is taken by RawCodec"):
        register_codec(Other)
    assert register_codec(RawCodec) is RawCodec


def test_versions() -> None:
    with pytest.raises(VersionError, match="the file has version 0, here is 1; pack the model again"):
        codec_from_spec(CodecSpec("raw", 0, {"dtype": "F32"}))


def test_codecs_that_cannot_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Half(Codec):
        id: ClassVar[str] = "half"
        version: ClassVar[int] = 0

    monkeypatch.setitem(REGISTRY, "half", Half)
    for make in (lambda: codec_from_spec(Half().spec()), lambda: SVDCodec(rank=1, factors=Half().spec().to_json())):
        with pytest.raises(CodecError, match="codec 'half' cannot decode; install another version of the package"):
            make()


def test_every_codec_class_is_registered() -> None:
    registered = {get_codec(id) for id in codec_ids()}
    assert registered == {cls for cls in Codec.__subclasses__() if cls.__module__.startswith("seedpack.")}


def test_raw() -> None:
    check_config(RawCodec("BF16"))
    decoded = check_contract(RawCodec("F32"), weight := torch.randn(4, 6))
    assert torch.equal(decoded, weight)
    with pytest.raises(CodecError, match="dtype must be one of"):
        RawCodec("float")


def test_no_matrix() -> None:
    for shape in [(3,), (), (3, 0)]:
        with pytest.raises(CodecError, match="is not a matrix; store it raw"):
            matrix_shape(shape)
