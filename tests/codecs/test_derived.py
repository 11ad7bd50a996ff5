"""Values that codecs keep between products follow the parts, however these are written to."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seedpack.codecs import derived
from seedpack.codecs.base import Codec, Parts
from seedpack.codecs.mask import MaskCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.image.codec import Field, FieldCodec, packed
from seedpack.image.coding import Sizes
from tests.helpers.fake_cuda import FakeCuda

SHAPE = (130, 24)
Case = tuple[Codec, Parts, Parts]


class Holder(nn.Module):
    """Parts as a packed layer holds them, and what the codec makes of them."""

    def __init__(self, codec: Codec, parts: Parts):
        super().__init__()
        self.codec = codec
        for name, part in parts.items():
            self.register_parameter(name, nn.Parameter(part.clone(), requires_grad=False))

    def forward(self) -> Tensor:
        x = torch.linspace(-1, 1, SHAPE[1])[None]
        return self.codec.matmul(x, dict(self.named_parameters()), SHAPE)


def pair(codec: Codec) -> Case:
    one, other = torch.randn(SHAPE), 30 * torch.randn(SHAPE) * torch.logspace(-1, 1, SHAPE[1])
    return codec, codec.encode(one), codec.encode(other)


def fields() -> Case:
    """Two images that differ in the unit of their bands."""
    codec = FieldCodec(1, 2, 4, sizes=(0,) * 4)
    bands, sizes = codec.network(SHAPE).bands(), Sizes.from_bytes(bytes(Sizes.nbytes(1)), 1)
    numbers = [np.ones(band.shape, np.int32) for band in bands]
    images = [
        {
            f"more_{i}" if i else "weight": torch.frombuffer(bytearray(stream), dtype=torch.uint8)[:, None, None]
            for i, stream in enumerate(packed(Field(np.ones(4, np.int32), 0.5, unit, numbers), sizes, bands))
        }
        for unit in (0.01, 0.02)
    ]
    return FieldCodec(1, 2, 4, sizes=[len(part) for part in images[0].values()]), images[0], images[1]


CASES: dict[str, Callable[[], Case]] = {
    "trellis-balance": lambda: pair(TrellisCodec(4, effort="fast")),
    "trellis": lambda: pair(TrellisCodec(4, effort="fast", balance=False)),
    "mask": lambda: pair(MaskCodec(0.3)),
    "field": fields,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def test_loading_in_inference_mode(case: Case) -> None:
    codec, one, other = case
    with torch.inference_mode():
        holder, expected = Holder(codec, one), Holder(codec, other)()
        assert not torch.equal(holder(), expected)
        holder.load_state_dict(other)
        assert torch.equal(holder(), expected)


def test_writing_to_data_part_by_part(case: Case) -> None:
    """Each part counts, not the first alone."""
    codec, one, other = case
    holder, mixture = Holder(codec, one), dict(one)
    holder()
    for name, part in holder.named_parameters():
        mixture[name] = other[name]
        part.data.copy_(other[name])
        assert torch.equal(holder(), Holder(codec, mixture)()), name


def test_casts_and_moves(case: Case) -> None:
    codec, one, other = case
    holder, expected = Holder(codec, one), Holder(codec, other)()
    holder()
    holder.to(torch.bfloat16).load_state_dict(other)
    assert torch.equal(holder(), expected)
    holder._apply(torch.clone)
    holder.load_state_dict(one)
    assert torch.equal(holder(), Holder(codec, one)())


def test_what_is_kept_is_used_and_goes_with_the_part() -> None:
    part, made = nn.Parameter(torch.zeros(1 << 17, dtype=torch.uint8), requires_grad=False), []

    def compute() -> int:
        made.append(1)
        return len(made)

    assert [derived.derived([part], "a", compute) for _ in range(3)] == [1, 1, 1]
    part.data[-1] = 1
    assert derived.derived([part], "a", compute) == 2 and derived.derived([part], "b", compute) == 3
    key = id(part)
    assert key in derived._entries
    del part
    gc.collect()
    assert key not in derived._entries


def test_on_a_gpu_the_factors_are_made_for_each_product() -> None:
    codec, one, other = CASES["trellis-balance"]()
    x = torch.linspace(-1, 1, SHAPE[1])[None]
    with FakeCuda():
        parts = {name: part.clone().to("cuda:0") for name, part in one.items()}
        results = []
        for parts_now in (one, other):
            for name, part in parts.items():
                part.copy_(parts_now[name])
            results.append(codec.matmul(x.to("cuda:0"), parts, SHAPE).cpu())
    for result, parts_now in zip(results, (one, other), strict=True):
        torch.testing.assert_close(result, codec.matmul(x, parts_now, SHAPE), rtol=1e-4, atol=1e-3)
