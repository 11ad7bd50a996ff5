"""What can be said only on a GPU: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import seedpack
from seedpack.codecs.base import Codec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.kernels.rotation import mix
from seedpack.kernels.trellis_matmul import reference, trellis_matmul
from seedpack.model.layers import pack_module_
from seedpack.prng import philox_words, rademacher, squirrel5
from tests.conftest import Net
from tests.kernels.products import LIMIT, error, seedlm, trellis

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CODEC = SeedLMCodec(10, 8, 3)
CODECS = (TrellisCodec(4, effort="fast"), CODEC, SVDCodec(rank=3), SVDCodec.over(CODEC, rank=3))


def test_generators_are_the_same_on_every_device() -> None:
    device = torch.device("cuda")
    assert torch.equal(philox_words(7, 1000, device=device).cpu(), philox_words(7, 1000))
    assert torch.equal(rademacher(7, 33, 40, device).cpu(), rademacher(7, 33, 40))
    assert torch.equal(squirrel5(torch.arange(1000, device=device), 5).cpu(), squirrel5(torch.arange(1000), 5))


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 33, 300])
@pytest.mark.parametrize("make", [trellis, seedlm], ids=lambda make: make.__name__)
def test_products(make: Any, tokens: int, dtype: torch.dtype) -> None:
    for sizes in ((2, 16), (3, 18), (4, 16)) if make is trellis else ((16, 8, 3), (16, 12, 4)):
        for rows, columns in ((67, 300), (512, 4096)):
            weight = make(*sizes, rows, columns, "cuda")
            dense = weight.dense("reference").double()
            assert torch.equal(weight.dense("triton").double(), dense)
            x, grad = torch.randn(columns, tokens).to(dtype).cuda().T, torch.randn(tokens, rows).to(dtype).cuda()
            assert error(weight.matmul(x.float(), dtype, "triton"), x.double() @ dense.T) < LIMIT[dtype]
            assert error(weight.transposed(grad.float(), dtype, "triton"), grad.double() @ dense) < LIMIT[dtype]


@pytest.mark.parametrize("code_bits", [2, 3, 4])
def test_activations_of_8_bits(code_bits: int) -> None:
    stream = torch.randint(0, 256, (128, 512, code_bits), dtype=torch.uint8).cuda().view(128, 1, -1)
    scale, x = torch.rand(128).cuda(), torch.randn(3, 4096).cuda()
    options: dict[str, Any] = {"code_bits": code_bits, "state_bits": 16, "key": 7}
    exact = trellis_matmul(reference.rounded(x).double(), stream, scale, backend="reference", **options).double()
    assert error(trellis_matmul(x, stream, scale, int8=True, backend="triton", **options), exact) < 2e-6


@pytest.mark.parametrize("width", [576, 4096, 14336])
def test_mixing(width: int) -> None:
    x, factor = torch.randn(3, width).cuda(), torch.randn(width).cuda()
    assert error(mix(x, factor, "triton"), mix(x.double(), factor.double(), "reference")) < 2e-6


def test_cuda_graph_of_a_packed_layer() -> None:
    """Captured once, a product follows its input."""
    parts = CODECS[0].encode(torch.randn(192, 256))
    layer = pack_module_(
        torch.nn.Linear(256, 192).cuda(), CODECS[0], {name: part.cuda() for name, part in parts.items()}
    )
    x = torch.randn(1, 256).cuda()
    layer(x)  # compiles, and makes what is derived from the parts
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn(1, 256))
    graph.replay()
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_seedlm_decodes_the_same_bits(dtype: torch.dtype) -> None:
    parts = CODEC.encode(torch.randn(33, 50))
    moved = {name: part.cuda() for name, part in parts.items()}
    assert torch.equal(CODEC.decode(moved, (33, 50), dtype).cpu(), CODEC.decode(parts, (33, 50), dtype, "reference"))


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.id)
def test_packed_model_on_the_gpu(codec: Codec, tmp_path: Path) -> None:
    seedpack.compress(Net(), tmp_path / "a", codec=codec)
    model = seedpack.load(tmp_path / "a", model=Net()).eval()
    ids = torch.arange(24).view(2, 12)
    expected = model(ids)
    torch.testing.assert_close(model.cuda()(ids.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
