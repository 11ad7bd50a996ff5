"""Supermasks: trained, saved, loaded; what is kept, what is frozen, what a file takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import seedpack
from seedpack.errors import CodecError, KeyNeededError, ModelError, NonfiniteError
from seedpack.formats import Checkpoint
from seedpack.loader.layers import PackedConv2d, PackedLinear
from seedpack.reparam import mask_
from seedpack.reparam.mask import kept_mask
from tests.helpers.nets import Net, batch, check_saved, trained


@pytest.mark.parametrize("kept", [0.5, 0.3])
def test_trains_and_saves(kept: float, tmp_path: Path) -> None:
    inputs, targets = batch(), torch.randint(0, 5, (4,))
    model: Any = mask_(Net(), kept, seed=3)
    scores = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith("original") for name in scores) and len(scores) == 5
    first, last = trained(model, inputs, targets)
    assert last < 0.4 * first
    for name, weight in (("conv", model.conv.weight), ("head", model.head.weight)):
        scale = math.sqrt(2 / (weight[0].numel() * kept))
        values = weight.unique()
        torch.testing.assert_close(values, torch.tensor([-scale, 0, scale]), msg=name)
        assert int((weight != 0).sum()) == round(kept * weight.numel())
    loaded = check_saved(model, Net, inputs, tmp_path / "net.safetensors")
    assert isinstance(loaded.head, PackedLinear) and isinstance(loaded.conv, PackedConv2d)
    check_saved(loaded, Net, inputs, tmp_path / "again.safetensors")


def test_all_else_is_frozen_and_said() -> None:
    model: Any = mask_(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)))
    model(torch.randn(8, 1, 4, 4) + 3)
    assert float(model[1].running_mean.abs().max()) > 0, "statistics run"
    assert torch.equal(model[1].weight, torch.ones(4)) and not model[1].weight.requires_grad
    assert torch.equal(model[3].bias, torch.zeros(3))
    kept: Any = mask_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), exclude=["1.*"])
    assert {name for name, p in kept.named_parameters() if p.requires_grad} == {
        "0.parametrizations.weight.original", "1.weight", "1.bias"
    }  # fmt: skip


def test_gradient_passes_straight_through() -> None:
    scores = torch.tensor([0.1, -3.0, 2.0, 0.5], requires_grad=True)
    mask = kept_mask(scores.abs(), 2)
    assert mask.tolist() == [0, 1, 1, 0]
    (mask * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [1, -2, 3, 4]
    assert kept_mask(torch.zeros(10), 3).sum() == 3, "equal scores too keep what was asked for"


def test_files_take_the_entropy(tmp_path: Path) -> None:
    model: Any = mask_(nn.Linear(400, 500, bias=False), 0.3)
    seedpack.save(model, tmp_path / "net.safetensors")
    with Checkpoint(tmp_path / "net.safetensors") as checkpoint:
        bits = 8 * len(checkpoint.part("weight", "weight").data) / 200_000
    entropy = -0.3 * math.log2(0.3) - 0.7 * math.log2(0.7)
    assert entropy < bits < 1.002 * entropy


def test_a_private_key_is_needed(tmp_path: Path) -> None:
    inputs, key, file = batch(), bytes(range(16)), tmp_path / "net.safetensors"
    model: Any = mask_(Net(), 0.5, key=key).eval()
    with torch.no_grad():
        expected = model(*inputs)
    seedpack.save(model, file)
    with pytest.raises(KeyNeededError, match="none is given"):
        seedpack.load(file, model=Net())
    with torch.no_grad():
        assert torch.equal(seedpack.load(file, model=Net(), key=key).eval()(*inputs), expected)


def test_encoders_run_on_a_packed_mask(tmp_path: Path) -> None:
    """torch's fast path reads the weights of their layers without calling them."""

    def fresh() -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    model, x = mask_(fresh()).eval(), torch.randn(2, 5, 16)
    seedpack.save(model, tmp_path / "net.safetensors")
    loaded = seedpack.load(tmp_path / "net.safetensors", model=fresh()).eval()
    assert isinstance(loaded.layers[0].linear1, PackedLinear)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


def test_fan_in_of_transformers_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(64, 16)  # 16 inputs, 64 outputs
    mask_(layer, 0.5)
    assert abs(float(layer.weight.detach().abs().max()) - math.sqrt(2 / (16 * 0.5))) < 1e-6


def test_scores_that_are_lost(tmp_path: Path) -> None:
    model: Any = mask_(nn.Linear(4, 4))
    with torch.no_grad():
        model.parametrizations.weight.original[0, 0] = float("nan")
    with pytest.raises(NonfiniteError, match="scores hold NaN or Inf"):
        seedpack.save(model, tmp_path / "net.safetensors")


def test_refusals() -> None:
    with pytest.raises(CodecError, match="kept must be above 0 and below 1"):
        mask_(Net(), 1.5)
    with pytest.raises(ModelError, match="no parameter to reparametrise"):
        mask_(nn.BatchNorm1d(3))
