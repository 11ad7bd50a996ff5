"""Layers of noise times coefficients: against their written-out weight, their start, their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import seedpack
import seedpack.nn as snn
from seedpack.errors import ModelError
from seedpack.loader.layers import PackedConv2d, PackedEmbedding, PackedLinear

GENERATORS = ["philox", "squirrel5", "hadamard"]


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("noise_bias", [False, True])
def test_layers_are_their_weights(generator: str, noise_bias: bool) -> None:
    options: dict[str, Any] = {"seed": 5, "generator": generator, "noise_bias": noise_bias}
    layers = [
        (snn.Linear(12, 7, 5, **options), torch.randn(2, 3, 12), lambda x, w, b: nn.functional.linear(x, w, b)),
        (
            snn.Conv2d(3, 6, (3, 2), 9, stride=2, padding=(1, 0), dilation=(1, 2), **options),
            torch.randn(2, 3, 9, 8),
            lambda x, w, b: nn.functional.conv2d(x, w, b, 2, (1, 0), (1, 2)),
        ),
        (
            snn.Embedding(11, 6, 4, **options),
            torch.randint(0, 11, (3, 5)),
            lambda x, w, b: nn.functional.embedding(x, w),
        ),
    ]
    for layer, x, written in layers:
        with torch.no_grad():
            layer.coefs.add_(torch.randn_like(layer.coefs) * 0.1)
        found = layer(x)
        weight = layer.weight
        expected = written(x, weight, getattr(layer, "bias", None))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        grad = torch.randn_like(found)
        (ours,) = torch.autograd.grad(found, layer.coefs, grad)
        (theirs,) = torch.autograd.grad(expected, layer.coefs, grad)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("noise_bias", [False, True])
def test_weights_start_at_torchs_scale(generator: str, noise_bias: bool) -> None:
    options: dict[str, Any] = {"generator": generator, "noise_bias": noise_bias}
    ratios = [
        (snn.Linear(200, 150, 128, seed=seed, **options).weight.std() / nn.Linear(200, 150).weight.std()).item()
        for seed in range(8)
    ]
    assert abs(sum(ratios) / 8 - 1) < 0.05
    ratios = [snn.Embedding(60, 50, 128, seed=seed, **options).weight.std().item() for seed in range(8)]
    assert abs(sum(ratios) / 8 - 1) < 0.05


def test_no_weight_is_kept() -> None:
    """Between the passes only inputs and coefficients are alive."""
    layer = snn.Linear(500, 400, 16)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = layer(torch.randn(3, 500))
    assert max(saved) <= 1500
    y.sum().backward()
    assert layer.coefs.grad is not None and layer.coefs.grad.shape == (1, 16)


class Net(nn.Module):
    def __init__(self, ours: bool, seed: int = 1):
        super().__init__()
        if ours:
            self.embedding: nn.Module = snn.Embedding(20, 16, 30, seed=seed)
            self.conv: nn.Module = snn.Conv2d(1, 4, 3, 20, padding=1, seed=seed + 1)
            self.head: nn.Module = snn.Linear(20, 5, 30, seed=seed + 2, coef_bits=8)
        else:
            self.embedding, self.conv, self.head = nn.Embedding(20, 16), nn.Conv2d(1, 4, 3, padding=1), nn.Linear(20, 5)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> Any:
        return self.head(torch.cat((self.conv(image).relu().mean((2, 3)), self.embedding(text).mean(1)), 1))


def test_trained_saved_loaded(tmp_path: Path) -> None:
    image, text, targets = torch.randn(4, 1, 6, 6), torch.randint(0, 20, (4, 3)), torch.randint(0, 5, (4,))
    model, file = Net(ours=True), tmp_path / "net.safetensors"
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(80):
        loss = nn.functional.cross_entropy(model(image, text), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    seedpack.save(model, file)
    with torch.no_grad():
        expected = model(image, text)
        assert torch.equal(seedpack.load(file, model=Net(ours=True))(image, text), expected)
        packed = seedpack.load(file, model=Net(ours=False))
        assert isinstance(packed.head, PackedLinear) and isinstance(packed.conv, PackedConv2d)
        assert isinstance(packed.embedding, PackedEmbedding)
        torch.testing.assert_close(packed(image, text), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="build it with the same settings"):
        seedpack.load(file, model=Net(ours=True, seed=9))


def test_indices_out_of_range() -> None:
    layer = snn.Embedding(5, 4, 3)
    for wrong in (5, -1):
        with pytest.raises(IndexError, match="out of range 0 … 4"):
            layer(torch.tensor([0, wrong]))
    assert layer(torch.empty(0, 2, dtype=torch.long)).shape == (0, 2, 4)


@pytest.mark.parametrize("generator", GENERATORS)
def test_an_input_of_another_width_is_refused(generator: str, tmp_path: Path) -> None:
    """A regenerated weight has no width of its own that a product would trip over."""
    layer = snn.Linear(12, 7, 5, generator=generator)
    for width in (6, 24):
        with pytest.raises(ModelError, match=rf"seedpack.nn.Linear: an input \[2, {width}\], expected \[..., 12\]"):
            layer(torch.randn(2, width))
    with pytest.raises(ModelError, match=r"seedpack.nn.Conv2d: an input .* expected \[..., 27\]"):
        snn.Conv2d(3, 6, 3, 9, generator=generator)(torch.randn(1, 4, 8, 8))
    seedpack.save(layer, tmp_path / "layer")
    packed = seedpack.load(tmp_path / "layer", model=nn.Linear(12, 7))
    with pytest.raises(ModelError, match=r"a packed Linear: an input \[2, 6\], expected \[..., 12\]"):
        packed(torch.randn(2, 6))
