"""torch's default dtype, which scripts set before they build a model, changes nothing that is packed or decoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seedpack
from seedpack.codecs.base import Codec
from seedpack.codecs.interfaces import HessianFitting
from seedpack.converter.plan import codec_for

SHAPE = (72, 96)
CODECS: dict[str, tuple[str, float | None, dict[str, Any]]] = {
    "trellis": ("trellis", 4.0, {}),
    "trellis-plain": ("trellis", 3.0, {"balance": False, "state_bits": 13, "circular": False}),
    "seedlm": ("seedlm", 3.0, {"exponents": 1}),
    "svd": ("svd", None, {"rank": 5, "levels": 2}),
    "svd+trellis": ("svd+trellis", None, {}),
    "basis": ("basis", 1.0, {"coef_bits": 8}),
    "basis-philox": ("basis", None, {"generator": "philox", "count": 6}),
    "mask": ("mask", None, {}),
}


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    yield request.param
    torch.set_default_dtype(torch.float32)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def results(name: str, weight: Tensor, inputs: Tensor, importance: Tensor, hessian: Tensor) -> dict[str, Tensor]:
    """Parts of every fit of a codec, and of the last one the weight and its products."""
    codec, found = codec_for(*CODECS[name]), dict[str, Tensor]()
    fits: list[tuple[Codec, Tensor | None]] = [(codec, None), (codec, importance)]
    fits += [(codec.with_hessian(), hessian)] if isinstance(codec, HessianFitting) else []
    for number, (codec, fit) in enumerate(fits):
        parts = codec.encode(weight, fit)
        found |= {f"{part} {number}": value for part, value in parts.items()}
    found["decoded"] = codec.decode(parts, SHAPE, torch.float32)
    found["rows"] = codec.decode_rows(parts, torch.tensor([71, 0]), SHAPE, torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        product = found[f"product {dtype}"] = codec.matmul(inputs.to(dtype), parts, SHAPE)
        found[f"transposed {dtype}"] = codec.matmul_transposed(product, parts, SHAPE)
    return found


@pytest.mark.parametrize("name", CODECS)
def test_codecs(name: str, default: torch.dtype) -> None:
    weight, inputs, importance = torch.randn(SHAPE), torch.randn(5, 96), torch.rand(96) + 0.1
    x = torch.randn(300, 96)
    given = weight, inputs, importance, x.T @ x / 300
    expected = results(name, *given)
    torch.set_default_dtype(default)
    same(results(name, *given), expected)


def test_calibrated_file(default: torch.dtype, tmp_path: Path) -> None:
    net, batches = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)), [torch.randn(9, 64)]
    for name in ("before", "after"):
        seedpack.compress(net, tmp_path / name, bits=3.5, calibration=batches)
        torch.set_default_dtype(default)
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()
    same(seedpack.load(tmp_path / "after", dense=True), seedpack.load(tmp_path / "before", dense=True))
    model = seedpack.load(
        tmp_path / "after", model=nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)).float()
    )
    assert model(batches[0]).dtype == torch.float32
