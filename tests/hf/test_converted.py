"""Tensors that transformers merges or splits on loading are packed as they are in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import seedpack
from seedpack.converter.sources.open import open_source
from seedpack.errors import ModelError
from tests.helpers.models import CODEC, SMALL, Folders, output

ATTENTION = "gte.layers.0.self_attn"


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(transformers.GteForMaskedLM(transformers.GteConfig(**SMALL)), tmp_path)


def test_tensors_are_the_models(folders: Folders) -> None:
    stored = load_file(folders.dense / "model.safetensors")
    assert any("qkv_proj" in name for name in stored), "they lie fused on disk"
    source = open_source(folders.dense)
    model = folders.cls.from_pretrained(folders.dense)
    state = model.state_dict()
    assert {source.parameters(name)[0] for name in source.tensors} == state.keys() - model.all_tied_weights_keys.keys()
    for name in source.tensors:
        found = source.read(name)
        assert torch.equal(found, state[source.parameters(name)[0]]) and found.is_contiguous(), name
    assert sum(t.source_bytes for t in source.tensors.values()) == sum(t.nbytes for t in stored.values())
    source.require_unchanged()
    kinds = {name.rpartition(".")[0].rpartition(".")[2]: t.kind for name, t in source.tensors.items() if t.kind}
    assert kinds.keys() >= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(kinds.values()) == {"linear", "embedding", "head"}


def test_some_of_them_left_raw(folders: Folders, tmp_path: Path) -> None:
    report = seedpack.compress(
        folders.dense, tmp_path / "some", codec=CODEC, exclude=["*q_proj.weight", "*layers.1.mlp*"]
    )
    assert sum(t.note == "excluded" for t in report.plan.tensors) > 2
    seedpack.unpack(tmp_path / "some", tmp_path / "unpacked")
    expected = output(folders.cls.from_pretrained(tmp_path / "unpacked"))
    model = folders.cls.from_pretrained(tmp_path / "some")
    torch.testing.assert_close(output(model), expected)
    assert type(model.gte.layers[0].self_attn.q_proj) is torch.nn.Linear
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(output(folders.cls.from_pretrained(tmp_path / "again")), expected)


def test_a_part_that_is_lost(folders: Folders) -> None:
    state = load_file(folders.packed / "model.safetensors")
    name = next(name for name in state if ".k_proj." in name and not name.endswith(("weight", "bias")))
    config: dict[str, Any] = {"format": "pt"}
    save_file({k: v for k, v in state.items() if k != name}, folders.packed / "model.safetensors", metadata=config)
    with pytest.raises(ModelError, match="lacks 1 of the model's tensors"):
        folders.cls.from_pretrained(folders.packed)


def test_a_fused_tensor_that_is_lost_or_short(folders: Folders, tmp_path: Path) -> None:
    path = folders.dense / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("qkv_proj.weight"))
    for changed in ({k: v for k, v in state.items() if k != name}, {**state, name: state[name][:-3].contiguous()}):
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"lacks|another shape|do not make up"):
            seedpack.compress(folders.dense, tmp_path / "more", codec=CODEC)
        assert not (tmp_path / "more").exists()
