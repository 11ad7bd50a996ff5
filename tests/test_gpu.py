"""What can be said only on a GPU: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import seedpack
from seedpack.codecs.base import Codec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.prng import philox_words, rademacher, squirrel5
from tests.conftest import Net

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CODEC = SeedLMCodec(10, 8, 3)


def test_generators_are_the_same_on_every_device() -> None:
    device = torch.device("cuda")
    assert torch.equal(philox_words(7, 1000, device=device).cpu(), philox_words(7, 1000))
    assert torch.equal(rademacher(7, 33, 40, device).cpu(), rademacher(7, 33, 40))
    assert torch.equal(squirrel5(torch.arange(1000, device=device), 5).cpu(), squirrel5(torch.arange(1000), 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_seedlm_decodes_the_same_bits(dtype: torch.dtype) -> None:
    parts = CODEC.encode(torch.randn(33, 50))
    moved = {name: part.cuda() for name, part in parts.items()}
    assert torch.equal(CODEC.decode(moved, (33, 50), dtype).cpu(), CODEC.decode(parts, (33, 50), dtype, "reference"))


@pytest.mark.parametrize("codec", [CODEC, SVDCodec(rank=3), SVDCodec.over(CODEC, rank=3)], ids=lambda c: c.id)
def test_packed_model_on_the_gpu(codec: Codec, tmp_path: Path) -> None:
    seedpack.compress(Net(), tmp_path / "a", codec=codec)
    model = seedpack.load(tmp_path / "a", model=Net()).eval()
    ids = torch.arange(24).view(2, 12)
    expected = model(ids)
    torch.testing.assert_close(model.cuda()(ids.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
