from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from seedpack.codecs.interfaces import Rates
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.stack import StackCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.errors import CodecError
from tests.helpers.codecs import check_config, check_contract, check_refusals

SMALL = SeedLMCodec(10, 8, 3)
CODECS = [
    StackCodec.over(SMALL, 8, 16),
    StackCodec.over(SMALL, 16, 8, transposed=True),
    StackCodec.over(TrellisCodec(2, effort="fast"), 8, 16),
    StackCodec.over(SVDCodec(rank=3), 8, 16),
]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shape", [(3, 128), (2, 384), (5, 128)], ids=str)
def test_contract(codec: StackCodec, shape: tuple[int, int]) -> None:
    check_contract(codec, torch.randn(shape))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_config_and_refusals(codec: StackCodec) -> None:
    check_config(codec)
    check_refusals(codec, torch.randn(3, 128))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_each_matrix_is_packed_as_it_would_be_alone(codec: StackCodec) -> None:
    weight = torch.randn(3, 128)
    parts = codec.encode(weight)
    for index, row in enumerate(weight):
        matrix = row.view(codec.matrix_rows, codec.matrix_columns)
        alone = codec.inner.encode(matrix.mT.contiguous() if codec.transposed else matrix)
        assert all(torch.equal(alone[name], part) for name, part in codec.at(parts, index).items())


def test_rates_are_those_of_the_codec_that_is_stacked() -> None:
    stack, codec = StackCodec.over(TrellisCodec(2), 8, 16), TrellisCodec(2)
    assert isinstance(stack, Rates) and not isinstance(StackCodec.over(SMALL, 8, 16), Rates)
    assert [variant.inner for variant in stack.variants()] == codec.variants()
    assert stack.expected_error() == codec.expected_error()
    assert copy.deepcopy(stack) == stack


def test_settings() -> None:
    spec = SMALL.spec().to_json()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"matrix_rows": 0, "matrix_columns": 4, "of": spec}, "matrix_rows must be a whole number"),
        ({"matrix_rows": 4, "matrix_columns": 4, "of": "trellis"}, "of must be a codec's id, version and config"),
        ({"matrix_rows": 4, "matrix_columns": 4, "of": {**spec, "id": 3}}, "of must name a codec's id and version"),
        (
            {"matrix_rows": 4, "matrix_columns": 4, "of": RawCodec().spec().to_json()},
            "of cannot be raw; name a codec of single matrices",
        ),
        ({"matrix_rows": 4, "matrix_columns": 4, "of": CODECS[0].spec().to_json()}, "of cannot be stack again"),
    ]
    for settings, message in wrong:
        with pytest.raises(CodecError, match=message):
            StackCodec(**settings)
    with pytest.raises(CodecError, match=r"a weight \[3, 100\] is no stack of matrices \[8, 16\]"):
        CODECS[0].parts((3, 100))
