"""The same bytes, with any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from seedpack.codecs.base import Codec
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.interfaces import HessianFitting
from seedpack.codecs.mask import MaskCodec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from tests.helpers.marks import slow_but

FAST = TrellisCodec(4, effort="fast")
CODECS: dict[str, Any] = {
    "trellis": FAST,
    "seedlm": SeedLMCodec.from_bits(4.0),
    "svd": SVDCodec(rank=64),
    "svd+trellis": SVDCodec.over(FAST, rank=64),
    "basis": BasisCodec(bits=0.1),
    "mask": MaskCodec(),
}
HESSIANS = ["trellis", "svd", "svd+trellis"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


TOGETHER = [(name, "none") for name in CODECS] + [("svd", "hessian"), ("trellis", "hessian"), ("mask", "channels")]


@pytest.mark.parametrize(
    ("name", "statistics"),
    slow_but(TOGETHER, [*product(CODECS, ["none", "channels"]), *product(HESSIANS, ["hessian"])]),
)
def test_fits(name: str, statistics: str) -> None:
    codec: Codec = CODECS[name]
    weight, x = torch.randn(64 if name == "seedlm" else 512, 1024), torch.randn(2048, 1024)
    if statistics == "hessian":
        assert isinstance(codec, HessianFitting)
        codec = codec.with_hessian()
    importance = {"none": None, "channels": torch.rand(1024) + 0.1, "hessian": x.T @ x / len(x)}[statistics]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(codec.encode(weight, importance))
        assert torch.get_num_threads() == threads
    for other in found[1:]:
        assert all(torch.equal(part, other[name]) for name, part in found[0].items())
