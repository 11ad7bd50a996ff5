"""What can be said only on a GPU: `pytest -m gpu`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import seedpack
from seedpack.codecs.base import Codec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.kernels.basis import noise_basis
from seedpack.kernels.basis.linear import basis_linear
from seedpack.kernels.rotation import mix
from seedpack.kernels.seedlm.code import SeedLMCode
from seedpack.kernels.seedlm.search import seedlm_search
from seedpack.kernels.trellis import matmul_reference as reference
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.matmul import trellis_matmul
from seedpack.kernels.trellis.search import trellis_search
from seedpack.loader.layers import pack_module_
from seedpack.prng import philox_words, rademacher, squirrel5
from tests.helpers.nets import OddNet
from tests.helpers.products import LIMIT, error, seedlm, trellis

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*passed over:RuntimeWarning"),  # machines with GPUs may lack Numba
]
CODEC = SeedLMCodec(10, 8, 3)
CODECS = (TrellisCodec(4, effort="fast"), CODEC, SVDCodec(rank=3), SVDCodec.over(CODEC, rank=3))


def test_generators_are_the_same_on_every_device() -> None:
    device = torch.device("cuda")
    assert torch.equal(philox_words(7, 1000, device=device).cpu(), philox_words(7, 1000))
    assert torch.equal(rademacher(7, 33, 40, device).cpu(), rademacher(7, 33, 40))
    assert torch.equal(squirrel5(torch.arange(1000, device=device), 5).cpu(), squirrel5(torch.arange(1000), 5))


def pairs(code_bits: int, state_bits: int, rows: int, columns: int, device: str) -> Any:
    """A trellis of two weights per window."""
    return trellis(code_bits, state_bits, rows, columns, device, weights=2)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 33, 300])
@pytest.mark.parametrize("make", [trellis, pairs, seedlm], ids=lambda make: make.__name__)
def test_products(make: Any, tokens: int, dtype: torch.dtype) -> None:
    of_trellis = ((2, 16), (3, 16)) if make is pairs else ((2, 16), (3, 18), (4, 16))
    for sizes in ((16, 8, 3), (16, 12, 4)) if make is seedlm else of_trellis:
        for rows, columns in ((67, 300), (512, 4096)):
            weight = make(*sizes, rows, columns, "cuda")
            dense = weight.dense("reference").double()
            assert torch.equal(weight.dense("triton").double(), dense)
            x, grad = torch.randn(columns, tokens).to(dtype).cuda().T, torch.randn(tokens, rows).to(dtype).cuda()
            assert error(weight.matmul(x.float(), dtype, "triton"), x.double() @ dense.T) < LIMIT[dtype]
            assert error(weight.transposed(grad.float(), dtype, "triton"), grad.double() @ dense) < LIMIT[dtype]


@pytest.mark.parametrize(("weights", "code_bits"), [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3)])
def test_activations_of_8_bits(weights: int, code_bits: int) -> None:
    stream = torch.randint(0, 256, (128, 512, code_bits), dtype=torch.uint8).cuda().view(128, 1, -1)
    scale, x = torch.rand(128).cuda(), torch.randn(3, 4096).cuda()
    code = TrellisCode(code_bits, 16, 7, weights=weights)
    exact = trellis_matmul(reference.rounded(x, weights).double(), stream, scale, code, backend="reference").double()
    assert error(trellis_matmul(x, stream, scale, code, int8=True, backend="triton"), exact) < 2e-6


@pytest.mark.parametrize("width", [576, 4096, 14336])
def test_mixing(width: int) -> None:
    x, factor = torch.randn(3, width).cuda(), torch.randn(width).cuda()
    assert error(mix(x, factor, "triton"), mix(x.double(), factor.double(), "reference")) < 2e-6


@pytest.mark.parametrize(("generator", "columns"), [("philox", 300), ("squirrel5", 4096)])
@pytest.mark.parametrize("tokens", [1, 8, 33])
def test_basis_products(tokens: int, generator: str, columns: int) -> None:
    coefs, x = torch.randn(2, 9).cuda().requires_grad_(), torch.randn(tokens, columns).cuda().requires_grad_()
    basis = noise_basis(generator, 5)
    weight = basis.dense(coefs.detach(), 70, columns, backend="reference")
    y = basis_linear(x, coefs, basis, rows=70)
    assert error(y.detach(), x.detach().double() @ weight.double().T) < LIMIT[torch.float32]
    grad = torch.randn(tokens, 70).cuda()
    grad_x, grad_coefs = torch.autograd.grad(y, (x, coefs), grad)
    assert error(grad_x, grad.double() @ weight.double()) < LIMIT[torch.float32]
    assert error(grad_coefs, basis.grad_coefs(grad, x.detach(), 2, 9, "reference").double()) < 1e-5


@pytest.mark.parametrize(
    ("weights", "code_bits", "state_bits", "survivors"),
    [(1, 1, 10, 5), (1, 2, 16, 9), (1, 4, 16, 8), (1, 4, 16, 12), (2, 2, 16, 12), (2, 3, 16, 10)],
)
def test_trellis_search(weights: int, code_bits: int, state_bits: int, survivors: int) -> None:
    values = torch.randn(7, 64) * 150
    code = TrellisCode(code_bits, state_bits, 77, weights=weights)
    expected = trellis_search(values, code, survivors=survivors, columns=61, backend="reference")
    assert torch.equal(trellis_search(values.cuda(), code, survivors=survivors, columns=61).cpu(), expected)


@pytest.mark.parametrize(("seed_bits", "block", "rank"), [(16, 8, 3), (16, 12, 4), (12, 8, 3), (7, 6, 6)])
@pytest.mark.parametrize("exponents", [1, 3])
def test_seedlm_search(seed_bits: int, block: int, rank: int, exponents: int) -> None:
    blocks = torch.randn(60, block) * torch.logspace(-4, 1, 60)[:, None]
    code = SeedLMCode(seed_bits, block, rank)
    expected = seedlm_search(blocks, None, -5, code, exponents=exponents, backend="reference").error
    found = seedlm_search(blocks.cuda(), None, -5, code, exponents=exponents).error.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.id)
def test_fits_as_well_as_on_the_cpu(codec: Codec) -> None:
    """Within 0.01 dB: sums are made in another order."""
    weight = torch.randn(130, 96)
    energy = [
        float((codec.decode(codec.encode(w), (130, 96), torch.float32).cpu() - weight).square().sum())
        for w in (weight, weight.cuda())
    ]
    assert abs(10 * math.log10(energy[0] / energy[1])) < 0.01


def test_cuda_graph_of_a_packed_layer() -> None:
    """Captured once, a product follows its input."""
    parts = CODECS[0].encode(torch.randn(192, 256))
    layer = pack_module_(
        torch.nn.Linear(256, 192).cuda(), CODECS[0], {name: part.cuda() for name, part in parts.items()}
    )
    x = torch.randn(1, 256).cuda()
    layer(x)  # compiles, and makes the rotation's signs
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
    seedpack.compress(OddNet(), tmp_path / "a", codec=codec)
    model = seedpack.load(tmp_path / "a", model=OddNet()).eval()
    ids = torch.arange(24).view(2, 12)
    expected = model(ids)
    torch.testing.assert_close(model.cuda()(ids.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
