"""Every fused product, on the CPU and in Triton's interpreter, against the dense weight in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from seedpack.errors import BackendError
from seedpack.kernels.common.bits import packed_shape
from seedpack.kernels.rotation import mix
from seedpack.kernels.trellis import matmul_reference as reference
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.matmul import trellis_linear, trellis_matmul
from tests.helpers.marks import slow, slow_but
from tests.helpers.products import LIMIT, Weight, error, seedlm, trellis

WEIGHTS: dict[str, Callable[[], Weight]] = {
    "trellis-1-16-5x37": lambda: trellis(1, 16, 5, 37),
    "trellis-2-12-35x300": lambda: trellis(2, 12, 35, 300),
    "trellis-3-18-33x264": lambda: trellis(3, 18, 33, 264),
    "trellis-4-16-17x515": lambda: trellis(4, 16, 17, 515),
    "trellis-5-20-7x96": lambda: trellis(5, 20, 7, 96),
    "trellis-8-16-1x1": lambda: trellis(8, 16, 1, 1),
    "trellis-2-16-9x520-zeros": lambda: trellis(2, 16, 9, 520, tail_biting=False),
    "trellis-3-18-9x515-zeros": lambda: trellis(3, 18, 9, 515, tail_biting=False),
    "trellis-2x3-16-17x515": lambda: trellis(3, 16, 17, 515, weights=2),
    "trellis-2x1-20-35x300": lambda: trellis(1, 20, 35, 300, weights=2),
    "trellis-2x2-16-9x520-zeros": lambda: trellis(2, 16, 9, 520, tail_biting=False, weights=2),
    "seedlm-16-8-3-33x300": lambda: seedlm(16, 8, 3, 33, 300),
    "seedlm-16-12-4-9x515": lambda: seedlm(16, 12, 4, 9, 515),
    "seedlm-13-7-4-35x37": lambda: seedlm(13, 7, 4, 35, 37),
    "seedlm-2-1-1-1x1": lambda: seedlm(2, 1, 1, 1, 1),
}
BACKENDS = ["cpu", "triton", "reference"]
# each codec as it is used, odd widths, streams of both ends; each count of tokens that takes a way of its own
DEFAULT = ["trellis-4-16-17x515", "trellis-3-18-9x515-zeros", "trellis-2x3-16-17x515", "seedlm-16-8-3-33x300"]
FEW = [(1, torch.bfloat16), (3, torch.float32), (33, torch.float16)]


@pytest.fixture(params=slow_but(DEFAULT, WEIGHTS))
def weight(request: pytest.FixtureRequest) -> Weight:
    return WEIGHTS[request.param]()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_dense_bit_for_bit(weight: Weight, backend: str, poison: None) -> None:
    found = weight.dense(backend)
    assert found.shape == (weight.rows, weight.columns)
    assert torch.equal(found, weight.dense("reference"))


@pytest.mark.parametrize(("tokens", "dtype"), slow_but(FEW, product([1, 3, 8, 33], LIMIT)), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_products(weight: Weight, backend: str, tokens: int, dtype: torch.dtype, poison: None) -> None:
    dense = weight.dense("reference").double()
    x = torch.randn(weight.columns, tokens).to(dtype).float().T  # not contiguous
    found = weight.matmul(x, dtype, backend)
    assert found.dtype == dtype and found.shape == (tokens, weight.rows)
    assert error(found, x.double() @ dense.T) < LIMIT[dtype]
    grad = torch.randn(weight.rows, tokens).to(dtype).float().T
    found = weight.transposed(grad, dtype, backend)
    assert found.dtype == dtype and found.shape == (tokens, weight.columns)
    assert error(found, grad.double() @ dense) < LIMIT[dtype]


@pytest.mark.parametrize("of", ["trellis", "seedlm"])
def test_tiles_of_bfloat16(of: str, monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    """Where the processor is faster at it; twice the limit: here the weight is rounded to bfloat16 too."""
    weight = trellis(4, 16, 17, 515) if of == "trellis" else seedlm(16, 8, 3, 33, 300)
    x, dense = torch.randn(33, weight.columns).bfloat16(), weight.dense("reference").double()
    found = []
    for faster in (False, True):
        monkeypatch.setattr("seedpack.kernels.common.row_tiles.bfloat16_is_faster", lambda faster=faster: faster)
        found.append(weight.matmul(x.float(), torch.bfloat16, "cpu"))
        assert found[-1].dtype == torch.bfloat16 and error(found[-1], x.double() @ dense.T) < 2 * LIMIT[torch.bfloat16]
    assert not torch.equal(*found)


@pytest.mark.parametrize("rows_at_a_time", [*slow(1), 4, *slow(100)])
def test_hundreds_of_tokens(weight: Weight, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    monkeypatch.setattr("seedpack.kernels.common.gpu_configs.DENSE_WEIGHTS", rows_at_a_time * weight.columns)
    # twice the limit: here the weight is rounded to bfloat16 too
    dtype, dense = torch.bfloat16, weight.dense("reference").double()
    x, grad = torch.randn(weight.columns, 256).to(dtype).T, torch.randn(256, weight.rows).to(dtype)
    found = weight.matmul(x.float(), dtype, "triton")
    assert found.dtype == dtype and error(found, x.double() @ dense.T) < 2 * LIMIT[dtype]
    found = weight.transposed(grad.float(), dtype, "triton")
    assert found.dtype == dtype and error(found, grad.double() @ dense) < 2 * LIMIT[dtype]


@pytest.mark.parametrize(
    ("form", "tokens"),
    slow_but(
        [("1x2", 33), ("2x2.5", 3), ("1x4", 1)], product(["1x2", "1x3", "1x4", "2x2", "2x2.5", "2x3"], [1, 3, 33])
    ),
    ids=str,
)
def test_activations_of_8_bits(form: str, tokens: int, poison: None) -> None:
    weights, _, bits = form.partition("x")
    code = TrellisCode(float(bits), 16, 7, weights=int(weights))
    stream = torch.randint(0, 256, code.stream_shape(35, 515), dtype=torch.uint8)
    scale, x = torch.rand(35), torch.randn(tokens, 515)
    exact = trellis_matmul(
        reference.rounded(x, code.weights).double(), stream, scale, code, backend="reference"
    ).double()
    for backend in BACKENDS:
        found = trellis_matmul(x, stream, scale, code, int8=True, backend=backend)  # type: ignore[arg-type]
        assert error(found, exact) < 2e-6
    whole = trellis_matmul(x, stream, scale, code, backend="reference").double()
    assert 1e-4 < error(exact, whole) < 0.02


def test_error_of_8_bits_is_a_hundredth_of_that_of_4_bit_weights() -> None:
    """In energy, beside the 0.0049 that 4-bit trellis weights lose (docs/benchmarks/trellis.md)."""
    x = torch.randn(64, 4096)
    assert error(reference.rounded(x), x.double()) ** 2 < 0.01 * 0.0049


@pytest.mark.parametrize("width", [1, 2, 5, 27, *slow(144), 576, *slow(1536), 4096, 1200, *slow(2 * 1031)])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_mixing(width: int, backend: str, poison: None) -> None:
    x, factor = torch.randn(width, 3).T, torch.randn(width)
    for given in (factor, None):
        exact = mix(x.double(), None if given is None else given.double(), "reference")
        assert error(mix(x, given, backend), exact) < 1e-6  # type: ignore[arg-type]
    assert mix(x[:0], factor, backend).shape == (0, width)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [96, 576])
def test_mixing_and_product_of_hundreds(columns: int) -> None:
    stream, scale = torch.randint(0, 256, packed_shape(17, columns, 4), dtype=torch.uint8), torch.rand(17)
    code = TrellisCode(4, 16, 7)
    x, factor = torch.randn(columns, 256).bfloat16().T, torch.randn(columns)
    rotated = mix(x.double(), factor.double(), "reference")
    exact = trellis_matmul(rotated, stream, scale, code, backend="reference").double()
    found = trellis_linear(x, factor, stream, scale, code, backend="triton")
    assert found.dtype == x.dtype and error(found, exact) < 2 * LIMIT[torch.bfloat16]


TOGETHER = [(0, 40, torch.float16), (1, 768, torch.bfloat16), (3, 40, torch.float32), (33, 40, torch.bfloat16)]


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize(
    ("tokens", "columns", "dtype"), slow_but(TOGETHER, product([0, 1, 3, 8, 33], [40, 768], LIMIT)), ids=str
)
def test_mixing_and_product_in_one(tokens: int, columns: int, dtype: torch.dtype, int8: bool, poison: None) -> None:
    for code_bits, weights in ((3, 2), (4, 1)):
        stream = torch.randint(0, 256, packed_shape(35, columns, code_bits), dtype=torch.uint8)
        scale, factor = torch.rand(35), torch.randn(columns)
        code = TrellisCode(code_bits, 16, 7, weights=weights)
        x = torch.randn(columns, tokens).to(dtype).T
        rotated = mix(x.float(), factor, "reference")
        rotated = reference.rounded(rotated, weights) if int8 else rotated
        exact = trellis_matmul(rotated.double(), stream, scale, code, backend="reference").double()
        for backend in BACKENDS:
            found = trellis_linear(x, factor, stream, scale, code, int8=int8, backend=backend)  # type: ignore[arg-type]
            assert found.dtype == dtype and found.shape == (tokens, 35)
            # sums in another order can round an activation the other way
            assert not tokens or error(found, exact) < (max(LIMIT[dtype], 2e-3) if int8 else LIMIT[dtype])


def test_what_a_backend_cannot_take() -> None:
    with pytest.raises(BackendError, match="backend 'triton' cannot run: a factor of the width 1023 is 1023"):
        mix(torch.zeros(1, 1023), backend="triton")
    large = seedlm(20, 16, 16, 2, 40)
    for backend in ("cpu", "triton"):
        with pytest.raises(BackendError, match=f"backend '{backend}' cannot run: blocks of 16×16 states of 20 bits"):
            large.dense(backend)
    with pytest.warns(RuntimeWarning, match="backend 'cpu' passed over, blocks of 16×16 states"):
        assert large.matmul(torch.zeros(1, 40), torch.float32, "auto").shape == (1, 2)
