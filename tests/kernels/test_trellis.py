from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from seedpack.codecs.trellis_effort import code_deviation
from seedpack.kernels.common.bits import pack, packed_shape
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode import trellis_decode
from seedpack.kernels.trellis.decode_reference import windows
from seedpack.kernels.trellis.scales import trellis_scales
from seedpack.kernels.trellis.search import trellis_search
from seedpack.prng import trellis_key, trellis_multiplier, trellis_values
from tests.helpers.marks import slow, slow_but

# (code bits, state bits, survivors, weights per window): survivors below, at and far below L - K; tags wider than a symbol;
# several vectors
SEARCHES = [
    (1, 10, 5, 1), (2, 12, 6, 1), *slow((2, 16, 9, 1)), (3, 16, 9, 1), *slow((4, 16, 8, 1)), (4, 9, 5, 1),
    *slow((4, 18, 7, 1), (8, 16, 8, 1), (1, 12, 6, 2)), (2, 16, 9, 2), (3, 13, 7, 2), (2.5, 13, 6, 2),
    *slow((3, 16, 10, 2), (3, 20, 6, 2), (1.5, 16, 9, 2), (3.5, 16, 9, 2)),
]  # fmt: skip
WEIGHTS = [(k, 1) for k in range(1, 9)] + [(k, 2) for k in (1, 1.5, 2, 2.5, 3, 3.5)]


@pytest.mark.parametrize(
    ("code_bits", "weights", "state_bits"),
    slow_but(
        [(1, 1, 12), (2, 1, 16), (3, 1, 20), (4, 1, 16), (1, 2, 20), (2, 2, 12), (3, 2, 16), (2.5, 2, 16)],
        [(*form, state_bits) for form, state_bits in product(WEIGHTS, [12, 16, 20])],
    ),
)
@pytest.mark.parametrize("tail_biting", [True, False])
def test_decode_is_the_definition_in_numpy(code_bits: float, weights: int, state_bits: int, tail_biting: bool) -> None:
    rng, key, rows, columns = np.random.default_rng(7), trellis_key(7), 3, 37
    code = TrellisCode(code_bits, state_bits, key, tail_biting, weights)
    octets = rng.integers(0, 256, code.stream_shape(rows, columns), dtype=np.uint8)
    expected = np.empty((rows, columns), np.int16)
    for r in range(rows):
        bits = np.unpackbits(octets[r].reshape(-1), bitorder="little")
        for t in range(columns):
            places = [int(weights * code_bits) * (t // weights) + i for i in range(state_bits)]
            window = sum(int(bits[p % len(bits)]) << i for i, p in enumerate(places) if tail_biting or p < len(bits))
            h = (window * trellis_multiplier(code_bits, state_bits, weights) + key) % 2**32
            b = h.to_bytes(4, "little")
            pair = (b[0] + b[1] + b[2] - 382, b[1] - b[2] + b[3] - 127)
            expected[r, t] = sum(b) - 510 if weights == 1 else pair[t % 2]
    for backend in ("reference", "cpu", *(["triton"] if state_bits == 16 else [])):
        found = trellis_decode(torch.from_numpy(octets), code, columns=columns, backend=backend)  # type: ignore[arg-type]
        assert found.dtype == torch.int16
        np.testing.assert_array_equal(found.numpy(), expected)


def test_values_are_nearly_normal() -> None:
    values = trellis_values(torch.arange(1 << 16), trellis_multiplier(4, 16), trellis_key(0)).double()
    assert abs(float(values.mean())) < 1 and abs(float(values.std()) - 147.8) < 1
    assert int(values.abs().max()) <= 510
    assert trellis_key(0) != trellis_key(1)


def test_values_of_two_weights_are_nearly_normal_and_not_correlated() -> None:
    values = trellis_values(torch.arange(1 << 16), trellis_multiplier(2, 16, 2), trellis_key(0), 2).double()
    assert values.shape == (1 << 16, 2) and float(values.mean(0).abs().max()) < 1.5
    assert bool(((values.std(0) - 128).abs() < 1).all()) and int(values.abs().max()) <= 383
    assert abs(float(torch.corrcoef(values.T)[0, 1])) < 0.01


def test_decode_of_other_memory() -> None:
    stream = torch.randint(0, 256, (6, 8, 2), dtype=torch.uint8)[::2].transpose(0, 0)
    code = TrellisCode(4, 16, 5)
    expected = trellis_decode(stream, code, columns=30, backend="reference")
    assert torch.equal(trellis_decode(stream, code, columns=30), expected)
    assert trellis_decode(stream[:0], code, columns=30).shape == (0, 30)


@pytest.mark.parametrize(("code_bits", "state_bits", "survivors", "weights"), SEARCHES)
@pytest.mark.parametrize(("columns", "padded"), [(37, 48), *slow((200, 208))])
def test_backends_find_the_same_stream(
    code_bits: float, state_bits: int, survivors: int, weights: int, columns: int, padded: int
) -> None:
    if weights * code_bits + survivors > 14:
        columns, padded = min(columns, 20), 32
    values = torch.randn(3, padded) * 150
    values[1] *= 10  # beyond the code's reach
    values[:, columns:] = torch.inf  # not to be looked at
    code = TrellisCode(code_bits, state_bits, trellis_key(7), weights=weights)
    options = {"survivors": survivors, "columns": columns}
    found = [trellis_search(values, code, **options, backend=backend) for backend in ("cpu", "reference")]  # type: ignore[arg-type]
    assert found[0].shape == code.stream_shape(3, padded)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("code_bits", "state_bits", "survivors", "weights"),
    [
        (1, 10, 5, 1),
        *slow((1, 12, 5, 2), (2, 16, 9, 1), (3, 12, 5, 1), (4, 16, 8, 1), (4, 18, 7, 1), (5, 13, 5, 1), (2, 14, 5, 2), (3, 13, 6, 2), (2.5, 13, 5, 2)),
    ],
)  # fmt: skip
def test_search_in_triton(code_bits: float, state_bits: int, survivors: int, weights: int, poison: None) -> None:
    values = torch.randn(2, 32) * 150
    values[1] *= 10
    values[:, 19:] = torch.inf
    code = TrellisCode(code_bits, state_bits, trellis_key(7), weights=weights)
    options = {"survivors": survivors, "columns": 19}
    found = [trellis_search(values, code, **options, backend=backend) for backend in ("triton", "cpu")]  # type: ignore[arg-type]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("code_bits", "state_bits", "survivors", "weights"),
    [
        (1, 10, 5, 1),
        (1, 10, 4, 2),
        *slow((2, 16, 9, 1), (4, 16, 8, 1), (4, 18, 7, 1), (2, 12, 6, 2), (3, 13, 6, 2), (2.5, 13, 6, 2)),
    ],
)
@pytest.mark.parametrize("feedback", [*slow(False), True], ids=["plain", "feedback"])
def test_streams_that_end_in_zeros(
    code_bits: float, state_bits: int, survivors: int, weights: int, feedback: bool, poison: None
) -> None:
    columns, padded = 61, 64
    values = torch.randn(2, padded) * 150
    values[:, columns:] = torch.inf
    factor = torch.eye(columns, dtype=torch.float64) + torch.randn(columns, columns, dtype=torch.float64).tril(-1) / 8
    code = TrellisCode(code_bits, state_bits, trellis_key(7), False, weights)
    options = {"survivors": survivors, "columns": columns, "factor": factor if feedback else None}
    found = [trellis_search(values, code, **options, backend=backend) for backend in ("cpu", "reference", "triton")]  # type: ignore[arg-type]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(("code_bits", "weights", "columns"), [(2, 1, 300), (2, 2, 300), *slow((4, 1, 1100))])
def test_feedback_lowers_the_error_of_the_product(code_bits: int, weights: int, columns: int) -> None:
    """By nearly what the factor promises: the mean square of its diagonal over that of its rows."""
    x = torch.randn(4 * columns, columns // 4).double() @ torch.randn(columns // 4, columns).double()
    hessian = x.T @ x / len(x) + columns / 10 * torch.eye(columns)
    factor = torch.linalg.cholesky(hessian)
    values = torch.randn(16, -(-columns // 8) * 8) * 140
    code = TrellisCode(code_bits, 16, trellis_key(0), False, weights)
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
    values = torch.randn(12, columns) * 140
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


@pytest.mark.parametrize(
    ("code_bits", "weights", "survivors", "stretch", "gap"),
    [
        (2, 1, 11, 1.06, 0.75),
        (4, 1, 9, 1.14, 1.1),
        (1, 2, 12, 1.0, 0.45),
        (2, 2, 12, 1.05, 0.65),
        (3, 2, 10, 1.08, 0.95),
        (2.5, 2, 11, 1.1, 0.75),
    ],
)
def test_distortion(code_bits: float, weights: int, survivors: int, stretch: float, gap: float) -> None:
    values = torch.randn(24, 1024)
    unit = math.sqrt(1 - 4.0**-code_bits) * stretch / code_deviation(weights)
    code = TrellisCode(code_bits, 16, trellis_key(0), weights=weights)
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
