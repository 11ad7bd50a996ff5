"""Fitting and computing on a GPU, as far as it can be said without one: devices are not mixed, and results are the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import seedpack
from seedpack.codecs.base import Codec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.errors import ModelError
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.marks import slow
from tests.helpers.nets import OddNet

SMALL = SeedLMCodec(8, 8, 3)
CODECS = (TrellisCodec(1, 9), SMALL, SVDCodec(rank=3), SVDCodec.over(SMALL, rank=3))
if torch.cuda.is_available():
    pytest.skip("a real one is at hand: pytest -m gpu", allow_module_level=True)


@pytest.mark.parametrize("importance", [*slow(None), torch.linspace(0.1, 2, 24)], ids=["plain", "weighted"])
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.id)
def test_codecs_stay_on_their_device(
    codec: Codec, importance: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seedpack.codecs.trellis.BALANCE_ROWS", 2)
    weight, shape = torch.randn(3, 24), (3, 24)
    parts = codec.encode(weight, importance)
    x, grad, index = torch.randn(2, 24), torch.randn(2, 3), torch.tensor([1, 2])
    with FakeCuda():
        found = codec.encode(weight.to("cuda:0"), importance)
        assert all(part.is_cuda for part in found.values())
        assert all(torch.equal(found[name].cpu(), part) for name, part in parts.items())
        results = (
            (codec.matmul(x.to("cuda:0"), found, shape), codec.matmul(x, parts, shape)),
            (codec.matmul_transposed(grad.to("cuda:0"), found, shape), codec.matmul_transposed(grad, parts, shape)),
            (
                codec.decode_rows(found, index.to("cuda:0"), shape, torch.float32),
                codec.decode_rows(parts, index, shape, torch.float32),
            ),
        )
        for there, here in results:
            assert there.is_cuda
            torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("codec", CODECS[:2], ids=lambda codec: codec.id)
def test_the_same_file_from_either_device(codec: Codec, tmp_path: Path) -> None:
    net = OddNet()
    seedpack.compress(net, tmp_path / "cpu", codec=codec)
    with FakeCuda():
        seedpack.compress(net, tmp_path / "cuda", codec=codec, device="cuda:0")
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "cuda").read_bytes()


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "nowhere"])
def test_devices_that_are_not_here(device: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"device '{device}'"):
        seedpack.compress(OddNet(), tmp_path / "a", codec=SMALL, device=device)
    assert not list(tmp_path.iterdir())
