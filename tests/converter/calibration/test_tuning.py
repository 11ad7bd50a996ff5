"""Layers tuned one by one undo what factors of rows and gains can undo."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from seedpack.converter.calibration import layerwise, tuning
from seedpack.errors import ModelError
from seedpack.hf.internals import decoder_layers
from tests.helpers.models import ARCHITECTURES, gemma4


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gemma4", "gpt2"])
def test_layers_learn_to_give_what_the_originals_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    teacher = ARCHITECTURES.get(name, gemma4)().float().eval()
    student = copy.deepcopy(teacher)
    layers = decoder_layers(student)
    inside = [(n, p) for n, p in student.named_parameters() if n.startswith(tuple(f"{layer}." for layer in layers))]
    rows = {n: n for n, p in inside if p.dim() == 2}
    values = [n for n, p in inside if p.dim() == 1]
    with torch.no_grad():
        for parameter in rows:
            weight = student.get_parameter(parameter)
            weight *= 1.2 if name != "gpt2" else torch.linspace(0.9, 1.1, weight.shape[1])
    before = {n: p.clone() for n, p in student.state_dict().items()}
    tokens = torch.randint(3, 96, (64, 16))
    monkeypatch.setattr(tuning, "TOKENS_AT_ONCE", 32)
    monkeypatch.setattr(tuning, "RATE", 0.1)
    watched: list[tuple[str, int, int, str]] = []

    learnt = tuning.tune(
        tuning.Student(student, list(layers), rows, values), teacher, tokens, epochs=0,
        progress=lambda stage, done, total, unit="", item="", /: watched.append((stage, done, total, unit)),
    )  # fmt: skip
    for key, value in student.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in layers.values())
    assert watched == [("Tuning layers", 1, 2, "layers")] * 2
    assert learnt.factors.keys() == rows.keys() and learnt.values.keys() == set(values)

    def distance() -> float:
        with torch.no_grad():
            a, b = (m(input_ids=tokens).logits for m in (teacher, student))
        return float(nn.functional.mse_loss(a, b))

    untuned = distance()
    with torch.no_grad():
        for key, factor in learnt.factors.items():
            weight = student.get_parameter(key)
            weight *= factor if name == "gpt2" else factor[:, None]
        for key, value in learnt.values.items():
            student.get_parameter(key).copy_(value)
    assert distance() < 0.3 * untuned


def test_nothing_to_tune_is_nothing_learnt() -> None:
    model = ARCHITECTURES["llama"]()
    assert tuning.tune(tuning.Student(model, [], {}, []), model, torch.zeros(1, 4, dtype=torch.int64)) == tuning.Tuned(
        {}, {}
    )


def test_what_has_lost_less_is_changed_less() -> None:
    torch.manual_seed(0)
    teacher = ARCHITECTURES["llama"]().float().eval()
    layers, tokens = decoder_layers(teacher), torch.randint(3, 96, (8, 16))
    names = [n for n, p in teacher.named_parameters() if p.dim() == 2 and "layers" in n]
    changes = []
    for error in (0.2, 0.02, 0.0):
        student = copy.deepcopy(teacher)
        with torch.no_grad():
            for name in names:
                student.get_parameter(name).mul_(1 - error)
        learnt = tuning.tune(
            tuning.Student(student, list(layers), {n: n for n in names}, ["model.norm.weight"]), teacher, tokens
        )
        changes.append(float(torch.cat([factor - 1 for factor in learnt.factors.values()]).abs().mean()))
    assert changes[0] == pytest.approx(10 * changes[1], rel=0.3)
    assert changes[2] == 0


@torch.no_grad()
def test_numbers_that_are_none_spoil_nothing_or_are_refused() -> None:
    torch.manual_seed(0)
    teacher = ARCHITECTURES["llama"]().float().eval()
    names = [n for n, p in teacher.named_parameters() if p.dim() == 2 and "layers" in n]
    teacher.get_input_embeddings().weight[5] = torch.nan
    student = copy.deepcopy(teacher)
    for name in names:
        student.get_parameter(name).mul_(0.9)
    tunable = tuning.Student(student, list(decoder_layers(teacher)), {n: n for n in names}, ["model.norm.weight"])
    learnt = tuning.tune(tunable, teacher, torch.randint(6, 96, (8, 16)))
    assert all(bool(value.isfinite().all()) for value in [*learnt.factors.values(), *learnt.values.values()])
    with pytest.raises(ModelError, match="no finite numbers; leave tuning out"):
        tuning.tune(tunable, teacher, torch.full((8, 16), 5))


@pytest.mark.parametrize("heads", [4, 8])
def test_biases_of_heads_are_whole_for_some_sequences(heads: int) -> None:
    config = transformers.MptConfig(d_model=32, n_heads=heads, n_layers=2, vocab_size=96, max_seq_len=64)
    model = transformers.MptForCausalLM(config).eval()
    tokens = torch.randint(3, 96, (4, 16))
    parts: list[torch.Tensor] = []

    def call(name: str, forward: Any, inputs: layerwise.LayerInputs) -> Any:
        out = [inputs.run_batch(forward, part) for part in layerwise.slices(4, 1)]
        parts.append(layerwise.hidden_in(layerwise.joined(out)))
        return (parts[-1], None)

    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        with layerwise.layer_by_layer(model, decoder_layers(model), call):
            torch.testing.assert_close(model(input_ids=tokens).logits, whole, rtol=1e-4, atol=1e-5)
    assert len(parts) == 2


def test_streams_before_sequences_are_refused() -> None:
    model, tokens = ARCHITECTURES["llama"](), torch.zeros(3, 8, dtype=torch.int64)
    with pytest.raises(ModelError, match=r"take \[4, 3, 8, 16\] for tokens \[3, 8\].*compress it without"):
        layerwise.LayerInputs((torch.zeros(4, 3, 8, 16),), {}, 4).require_tokens(model, tokens)
