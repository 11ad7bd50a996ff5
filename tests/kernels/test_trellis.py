from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from seedpack.kernels.common.bits import pack, packed_shape
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode import trellis_decode
from seedpack.kernels.trellis.decode_reference import windows
from seedpack.kernels.trellis.scales import trellis_scales
from seedpack.kernels.trellis.search import trellis_search
from seedpack.prng import trellis_key, trellis_multiplier, trellis_values
from tests.helpers.marks import slow, slow_but

# (code bits, state bits, survivors): survivors below, at and far below L - k; tags wider than a symbol; two vectors
SEARCHES = [
    (1, 10, 5), (2, 12, 6), *slow((2, 16, 9)), (3, 16, 9), *slow((4, 16, 8)), (4, 9, 5), *slow((4, 18, 7), (8, 16, 8)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("code_bits", "state_bits"),
    slow_but([(1, 12), (2, 16), (3, 20), (4, 16)], product(range(1, 9), [12, 16, 20])),
)
@pytest.mark.parametrize("tail_biting", [True, False])
def test_decode_is_the_definition_in_numpy(code_bits: int, state_bits: int, tail_biting: bool) -> None:
    rng = np.random.default_rng(code_bits)
    rows, columns, padded = 3, 37, 40
    octets = rng.integers(0, 256, packed_shape(rows, padded, code_bits), dtype=np.uint8)
    key = trellis_key(code_bits)
    expected = np.empty((rows, columns), np.int16)
    for r in range(rows):
        bits = np.unpackbits(octets[r].reshape(-1), bitorder="little")
        for t in range(columns):
            places = [code_bits * t + i for i in range(state_bits)]
            window = sum(int(bits[p % len(bits)]) << i for i, p in enumerate(places) if tail_biting or p < len(bits))
            h = (window * trellis_multiplier(code_bits, state_bits) + key) % 2**32
            expected[r, t] = sum(h.to_bytes(4, "little")) - 510
    for backend in ("reference", "cpu", *(["triton"] if state_bits == 16 else [])):
        code = TrellisCode(code_bits, state_bits, key, tail_biting)
        found = trellis_decode(torch.from_numpy(octets), code, columns=columns, backend=backend)  # type: ignore[arg-type]
        assert found.dtype == torch.int16
        np.testing.assert_array_equal(found.numpy(), expected)


def test_values_are_nearly_normal() -> None:
    values = trellis_values(torch.arange(1 << 16), trellis_multiplier(4, 16), trellis_key(0)).double()
    assert abs(float(values.mean())) < 1 and abs(float(values.std()) - 147.8) < 1
    assert int(values.abs().max()) <= 510
    assert trellis_key(0) != trellis_key(1)


def test_decode_of_other_memory() -> None:
    stream = torch.randint(0, 256, (6, 8, 2), dtype=torch.uint8)[::2].transpose(0, 0)
    code = TrellisCode(4, 16, 5)
    expected = trellis_decode(stream, code, columns=30, backend="reference")
    assert torch.equal(trellis_decode(stream, code, columns=30), expected)
    assert trellis_decode(stream[:0], code, columns=30).shape == (0, 30)


@pytest.mark.parametrize(("code_bits", "state_bits", "survivors"), SEARCHES)
@pytest.mark.parametrize(("columns", "padded"), [(37, 40), *slow((200, 200))])
def test_backends_find_the_same_stream(
    code_bits: int, state_bits: int, survivors: int, columns: int, padded: int
) -> None:
    if 1 << code_bits + survivors > 1 << 14:
        columns, padded = min(columns, 20), 24
    values = torch.randn(3, padded) * 150
    values[1] *= 10  # beyond the code's reach
    values[:, columns:] = torch.inf  # not to be looked at
    code, options = TrellisCode(code_bits, state_bits, trellis_key(7)), {"survivors": survivors, "columns": columns}
    found = [trellis_search(values, code, **options, backend=backend) for backend in ("cpu", "reference")]  # type: ignore[arg-type]
    assert found[0].shape == packed_shape(3, padded, code_bits)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("code_bits", "state_bits", "survivors"),
    [(1, 10, 5), (2, 16, 9), *slow((3, 12, 5), (4, 16, 8), (4, 18, 7), (5, 13, 5))],
)
def test_search_in_triton(code_bits: int, state_bits: int, survivors: int, poison: None) -> None:
    values = torch.randn(2, 24) * 150
    values[1] *= 10
    values[:, 19:] = torch.inf
    code, options = TrellisCode(code_bits, state_bits, trellis_key(7)), {"survivors": survivors, "columns": 19}
    found = [trellis_search(values, code, **options, backend=backend) for backend in ("triton", "cpu")]  # type: ignore[arg-type]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("code_bits", "state_bits", "survivors"), [(1, 10, 5), *slow((2, 16, 9), (4, 16, 8), (4, 18, 7))]
)
@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
def test_streams_that_end_in_zeros(
    code_bits: int, state_bits: int, survivors: int, feedback: bool, poison: None
) -> None:
    columns, padded = 61, 64
    values = torch.randn(2, padded) * 150
    values[:, columns:] = torch.inf
    factor = torch.eye(columns, dtype=torch.float64) + torch.randn(columns, columns, dtype=torch.float64).tril(-1) / 8
    code = TrellisCode(code_bits, state_bits, trellis_key(7), tail_biting=False)
    options = {"survivors": survivors, "columns": columns, "factor": factor if feedback else None}
    found = [trellis_search(values, code, **options, backend=backend) for backend in ("cpu", "reference", "triton")]  # type: ignore[arg-type]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(("code_bits", "columns"), [(2, 300), *slow((4, 1100))])
def test_feedback_lowers_the_error_of_the_product(code_bits: int, columns: int) -> None:
    """By nearly what the factor promises: the mean square of its diagonal over that of its rows."""
    x = torch.randn(4 * columns, columns // 4).double() @ torch.randn(columns // 4, columns).double()
    hessian = x.T @ x / len(x) + columns / 10 * torch.eye(columns)
    factor = torch.linalg.cholesky(hessian)
    values = torch.randn(16, -(-columns // 8) * 8) * 140
    code = TrellisCode(code_bits, 16, trellis_key(0), tail_biting=False)
    errors = []
    for given in (None, factor):
        stream = trellis_search(values, code, survivors=8, columns=columns, factor=given)
        error = trellis_decode(stream, code, columns=columns).double() - values[:, :columns]
        errors.append(float((error @ factor).square().sum()))
    promised = float(factor.diagonal().square().sum() / factor.square().sum())
    assert promised < 0.75
    assert promised < errors[1] / errors[0] < 1.25 * promised


def test_search_against_all_streams() -> None:
    """With every state kept the error stays near the least of all 2^16 streams, which the choice of where its ends meet alone keeps it from."""
    code, columns = TrellisCode(1, 5, trellis_key(0)), 16
    values = torch.randn(24, columns) * 140
    every = torch.tensor(list(product((0, 1), repeat=columns)))
    codes = trellis_decode(pack(every, 1), code, columns=columns).double()
    rounded = values.round().double()
    least = ((rounded[:, None] - codes) ** 2).sum(2).amin(1)
    stream = trellis_search(values, code, survivors=4, columns=columns)
    found = trellis_decode(stream, code, columns=columns)
    error = ((rounded - found) ** 2).sum(1)
    assert bool((error >= least).all())
    assert float(error.sum() / least.sum()) < 1.1
    assert bool((error == least).any())


@pytest.mark.parametrize(("code_bits", "survivors", "stretch", "gap"), [(2, 11, 1.06, 0.75), (4, 9, 1.14, 1.1)])
def test_distortion(code_bits: int, survivors: int, stretch: float, gap: float) -> None:
    values = torch.randn(24, 1024)
    unit = math.sqrt(1 - 4.0**-code_bits) * stretch / 147.8
    code = TrellisCode(code_bits, 16, trellis_key(0))
    stream = trellis_search(values / unit, code, survivors=survivors, columns=1024)
    found = trellis_decode(stream, code, columns=1024).float() * unit
    error = float((values - found).square().mean() / values.square().mean())
    assert 10 * math.log10(error * 4**code_bits) < gap


def test_windows_overlap() -> None:
    stream = torch.randint(0, 256, packed_shape(2, 24, 3), dtype=torch.uint8)
    window = windows(stream, TrellisCode(3, 16, 0), 24)
    assert torch.equal(window[:, :-1] >> 3, window[:, 1:] & (1 << 13) - 1)
    assert torch.equal(window[:, -1] >> 3, window[:, 0] & (1 << 13) - 1)


@pytest.mark.parametrize(("rows", "columns"), [(5, 1), (130, 37), (600, 1100)])
@pytest.mark.parametrize("exponent", [-100, -3, 0, 100])
def test_factors(rows: int, columns: int, exponent: int, poison: None) -> None:
    scales = torch.cat([torch.randn(rows - 2), torch.tensor([2.0**-24, 65504.0])]).half().view(torch.int16)
    balance = torch.randint(0, 256, packed_shape(1, columns, 4), dtype=torch.uint8)
    power, signs = torch.tensor([exponent], dtype=torch.int8), torch.randn(columns).sign()
    for given in (balance, None):
        expected = trellis_scales(scales, power, given, signs, backend="reference")
        found = trellis_scales(scales, power, given, signs, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    exact = scales.view(torch.float16).double() * 2.0 ** (exponent - 7)
    assert torch.equal(expected[0].double(), exact) and torch.equal(expected[1], signs)
