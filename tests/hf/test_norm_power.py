from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import seedpack
from seedpack.converter.sources.open import open_source
from seedpack.hf.checkpoint_names import CheckpointNames
from seedpack.hf.norm_power import norm_before_layer, output_power
from tests.helpers.models import llama


def test_followers_of_a_llama(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    found = norm_before_layer(CheckpointNames.of_folder(tmp_path).model)
    assert found["model.layers.0.self_attn.q_proj"] == "model.layers.0.input_layernorm"
    assert found["model.layers.1.mlp.up_proj"] == "model.layers.1.post_attention_layernorm"
    assert "model.layers.0.mlp.down_proj" not in found and "model.layers.0.self_attn.o_proj" not in found
    assert found["lm_head"] == "model.norm"


def test_power_is_the_gain_squared(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.2, 3.0)
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    power = source.norm_power("model.layers.1.mlp.gate_proj.weight")
    assert power is not None
    gain = model.model.layers[1].post_attention_layernorm.weight.detach().double()
    torch.testing.assert_close(power, gain.square(), rtol=1e-4, atol=1e-6)
    head = next(name for name, tensor in source.tensors.items() if tensor.kind == "head")
    torch.testing.assert_close(
        source.norm_power(head), model.model.norm.weight.detach().double().square(), rtol=1e-4, atol=1e-6
    )
    assert source.norm_power("model.layers.0.self_attn.o_proj.weight") is None


def test_power_of_other_norms() -> None:
    norm = nn.LayerNorm(6)
    values = {"weight": torch.tensor([1.0, -2, 3, 0.5, 0, 1]), "bias": torch.arange(6.0)}
    torch.testing.assert_close(
        output_power(norm.to("meta"), values),
        values["weight"].double() ** 2 + values["bias"].double() ** 2,
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip


def test_models_that_cannot_run_so() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer_norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x: torch.Tensor = self.fc(self.layer_norm(torch.zeros(1, 4)))
            return x[x.sum() > 0]  # needs values

    with torch.device("meta"):
        model = Odd().train()
    assert norm_before_layer(model) == {"fc": "layer_norm"} and model.training
    assert not model.fc._forward_pre_hooks


@pytest.mark.parametrize("given", [True, False])
def test_compress_uses_it(tmp_path: Path, given: bool) -> None:
    """With gains far apart the error is smaller in channels of large gain, unless importance is given."""
    model = llama(intermediate_size=160)
    gain = torch.logspace(-1, 1, model.config.hidden_size)
    weight = torch.randn(160, model.config.hidden_size)
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.copy_(gain)
        model.model.layers[0].mlp.up_proj.weight.copy_(weight)
    model.save_pretrained(tmp_path / "dense")
    name = "model.layers.0.mlp.up_proj.weight"
    flat = {name: torch.ones(len(gain))} if given else None
    seedpack.compress(tmp_path / "dense", tmp_path / "packed", settings={"effort": "fast"}, importance=flat)
    error = (seedpack.load(tmp_path / "packed", dense=True)[name] - weight).square().mean(0)
    half = len(gain) // 2
    ratio = float(error[half:].mean() / error[:half].mean())
    assert ratio > 0.8 if given else ratio < 0.5


def test_a_convolution_behind_a_norm(tmp_path: Path) -> None:
    """Its columns are channels and places, so the power of channels says nothing of them."""
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8
    )
    transformers.SegformerModel(config).save_pretrained(tmp_path / "dense")
    report = seedpack.compress(tmp_path / "dense", tmp_path / "packed", settings={"effort": "fast"})
    assert any(
        t.packed and t.kind == "conv" and t.name.endswith("attention.self.sr.weight") for t in report.plan.tensors
    )
