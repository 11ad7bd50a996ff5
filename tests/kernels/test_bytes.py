"""The trellis's product of many tokens in bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seedpack.codecs.trellis import TrellisCodec
from seedpack.kernels.rotation import mix
from seedpack.kernels.trellis import bytes as byte_products
from seedpack.kernels.trellis import bytes_reference as reference
from seedpack.kernels.trellis import decode_cpu
from seedpack.kernels.trellis.bytes import bytes_are_faster, trellis_byte_linear
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode import trellis_dense
from seedpack.loader.layers import pack_module_
from tests.helpers.products import error

FORMS = [(1, 4), (1, 2), (2, 3), (2, 1), (2, 2.5)]


def stream_of(rows: int, columns: int, code: TrellisCode) -> torch.Tensor:
    return torch.randint(0, 256, code.stream_shape(rows, columns), dtype=torch.uint8)


@pytest.mark.parametrize(("weights", "code_bits"), FORMS)
@pytest.mark.parametrize("columns", [40, 515])
def test_weights_of_8_bits(weights: int, code_bits: float, columns: int, poison: None) -> None:
    code = TrellisCode(code_bits, 16, 7, weights=weights)
    stream = stream_of(35, columns, code)
    exact = reference.eight_bits(stream, code, columns)
    assert torch.equal(decode_cpu.eight_bits(stream, code, columns), exact)
    assert int(exact.max()) <= 127 and int(exact.min()) >= -127


@pytest.mark.parametrize(("weights", "code_bits"), FORMS)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("tokens", "columns", "dtype"), [(33, 40, torch.bfloat16), (9, 768, torch.float32)])
def test_products(
    weights: int, code_bits: float, planes: int, tokens: int, columns: int, dtype: torch.dtype, poison: None
) -> None:
    code = TrellisCode(code_bits, 16, 7, weights=weights)
    stream, scale, factor = stream_of(35, columns, code), torch.rand(35), torch.randn(columns)
    x = torch.randn(columns, tokens).to(dtype).T
    backends = ["reference"] + ["cpu"] * hasattr(torch, "_int_mm")
    exact, *found = (
        trellis_byte_linear(x, factor, stream, scale, code, planes=planes, backend=backend)  # type: ignore[arg-type]
        for backend in backends
    )
    for other in found:
        assert other.dtype == dtype and torch.equal(other, exact)
    rotated = mix(x.float(), factor).double()
    whole = rotated @ trellis_dense(stream, scale, code, columns=columns, backend="reference").double().T
    assert error(exact, whole) < 0.02


def test_they_add_a_hundredth_to_the_error_of_4_bit_weights() -> None:
    """In energy, beside the 0.0049 that these lose (docs/benchmarks/trellis.md); at 3 bits, of 8-bit activations, beside 0.0187."""
    x, scale = torch.randn(64, 4096), torch.ones(256)
    for code_bits, weights, planes, loss in ((4, 1, 2, 0.0049), (3, 2, 1, 0.0187)):
        code = TrellisCode(code_bits, 16, 7, weights=weights)
        stream = stream_of(256, 4096, code)
        dense = trellis_dense(stream, scale, code, columns=4096).double()
        found = reference.matmul(x, stream, scale, code, planes, torch.float32)
        assert error(found, x.double() @ dense.T) ** 2 < 0.0115 * loss


def test_what_is_not_finite_stays_so() -> None:
    code = TrellisCode(4, 16, 7)
    stream, x = stream_of(8, 64, code), torch.randn(12, 64)
    x[3, 5], x[7, 0] = torch.inf, torch.nan
    found = reference.matmul(x, stream, torch.rand(8), code, 2, torch.float32)
    finite = found.isfinite().all(1)
    assert not finite[3] and not finite[7] and int(finite.sum()) == 10


@pytest.mark.rounds
@pytest.mark.parametrize(("code_bits", "least", "most"), [(2, 1e-3, 2e-2), (3, 1e-3, 2e-2), (4, 0, 1e-5)])
def test_layers_take_them_where_they_cost_little(
    code_bits: int, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = nn.Linear(576, 64), torch.randn(3, 11, 576)
    codec = TrellisCodec(code_bits, effort="fast")
    packed = pack_module_(layer, codec, codec.encode(layer.weight.detach()))
    exact = x @ packed.dense_weight().T + layer.bias
    with torch.no_grad():
        if bytes_are_faster(x):
            assert least <= float((packed(x) - exact).norm() / exact.norm()) < most
        monkeypatch.setattr(byte_products, "_multiplies_bytes", lambda: False)
        torch.testing.assert_close(packed(x), exact)
        monkeypatch.undo()
        packed.int8_activations = True
        if bytes_are_faster(x):
            assert 1e-3 < float((packed(x) - exact).norm() / exact.norm()) < 2e-2
        packed.int8_activations = False
        torch.testing.assert_close(packed(x), exact)
