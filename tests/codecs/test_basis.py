from __future__ import annotations

from typing import Any

import pytest
import torch

from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.coefficients import WIDTHS, coefficient_parts, rounded, stored, values_of
from seedpack.errors import CodecError
from tests.helpers.codecs import check_config, check_contract, check_hessian, check_refusals

CODECS = [
    BasisCodec(count=20),
    BasisCodec(count=70, coef_bits=4, seed=9),
    BasisCodec(bits=1.5, coef_bits=16),
    BasisCodec(count=33, coef_bits=5, levels=4),
    BasisCodec("philox", count=11, blocks=3),
    BasisCodec("squirrel5", count=5, blocks=2, coef_bits=8),
]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shape", [(32, 48), (48, 31), (5, 3)], ids=str)
def test_contract(codec: BasisCodec, shape: tuple[int, int]) -> None:
    check_contract(codec, torch.randn(shape))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_config_and_refusals(codec: BasisCodec) -> None:
    check_config(codec)
    check_refusals(codec, torch.randn(32, 48))


def test_hessians() -> None:
    check_hessian(BasisCodec(count=1000), 0.9)


@pytest.mark.parametrize("generator", ["hadamard", "philox", "squirrel5"])
def test_a_weight_in_the_span_is_found_and_others_are_projected(generator: str) -> None:
    codec = BasisCodec(generator, count=40, seed=3)
    shape = (30, 20)
    coefs = torch.randn(1, 40)
    weight = codec.decode(stored(coefs, 32), shape, torch.float32)
    torch.testing.assert_close(values_of(codec.encode(weight), 40, 32), coefs, rtol=1e-3, atol=1e-3)
    other = torch.randn(shape)
    error = codec.decode(codec.encode(other), shape, torch.float32) - other
    share = float(error.square().sum() / other.square().sum())
    assert abs(share - (1 - 40 / 600)) < 0.05, "M of n dimensions hold M / n of the energy"
    bases = torch.stack([codec.decode(stored(unit[None], 32), shape, torch.float32) for unit in torch.eye(40)]).flatten(
        1
    )
    assert float((bases @ error.flatten()).abs().max()) < 1e-2 * float(bases[0].norm()), "what is left is orthogonal"


@pytest.mark.parametrize("bits", WIDTHS)
def test_coefficients_as_stored(bits: int) -> None:
    coefs = torch.randn(3, 4001) * torch.tensor([[1e-6], [1.0], [300.0]])
    parts = stored(coefs, bits)
    specs = coefficient_parts(3, 4001, bits)
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        name: shape for name, (_, shape) in specs.items()
    }
    found = rounded(coefs, bits)
    assert torch.equal(rounded(found, bits), found) or bits < 16
    limits = {2: 0.135, 3: 0.045, 4: 0.015, 5: 0.005, 6: 0.0016, 7: 5e-4, 8: 1.7e-4, 16: 1e-4, 32: 0.0}
    error = (found - coefs).square().sum(1) / coefs.square().sum(1)
    assert float(error[1:].max()) <= limits[bits], "near the best uniform quantiser's (Max, 1960)"
    assert bits == 16 or float(error[0]) <= limits[bits], "however small"


def test_zeros_and_refusals() -> None:
    codec = BasisCodec(count=5, coef_bits=4)
    assert float(codec.decode(codec.encode(torch.zeros(4, 9)), (4, 9), torch.float32).abs().max()) < 1e-20
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"count": 0}, "count must be a whole number"),
        ({}, "give either count or bits"),
        ({"count": 3, "bits": 1.0}, "give either count or bits"),
        ({"bits": 40.0}, "bits must be above 0"),
        ({"count": 3, "coef_bits": 9}, "coef_bits must be one of"),
        ({"count": 3, "generator": "sobol"}, "generator must be one of"),
        ({"count": 3, "generator": "philox", "key": "00"}, "must be 16 hexadecimal digits"),
        ({"count": 3, "generator": "philox", "key": 16 * "0"}, "'philox' takes no private key"),
    )
    for settings, message in wrong:
        with pytest.raises(CodecError, match=message):
            BasisCodec(**settings)
    codec = BasisCodec(count=5)
    parts = codec.encode(torch.randn(4, 9))
    parts["weight"][0, 0, 2] = torch.tensor(float("nan")).view(torch.int32)
    with pytest.raises(CodecError, match="NaN or Inf"):
        codec.check(parts, (4, 9))


@pytest.mark.parametrize("bits", [4, 16, 32])
def test_first_levels_are_fewer_bases(bits: int) -> None:
    codec, shape = BasisCodec(count=40, coef_bits=bits, levels=4), (30, 20)
    coefs = rounded(torch.randn(1, 40), bits)
    parts = stored(coefs, bits, 4)
    first = {name: part for name, part in parts.items() if name not in ("more_2", "more_3")}
    codec.check(first, shape)
    coefs[:, 20:] = 0
    expected = BasisCodec(count=40).decode(stored(coefs, 32), shape, torch.float32)
    torch.testing.assert_close(codec.decode(first, shape, torch.float32), expected)
