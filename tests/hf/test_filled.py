"""transformers models filled by `seedpack.load(file, model=model)`: what is saved of them is a packed folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import seedpack
from seedpack.formats import Checkpoint
from seedpack.loader.parameters import packed_leaves
from tests.helpers.models import ARCHITECTURES, CODEC, llama, output


def filled(make: Any, path: Path) -> Any:
    torch.manual_seed(0)
    torch.save(make().state_dict(), path / "net.pt")
    seedpack.compress(path / "net.pt", path / "net.safetensors", codec=CODEC)
    return seedpack.load(path / "net.safetensors", model=make())


def packed_weights(model: nn.Module) -> set[str]:
    return {f"{name}.{leaf}" for name, module in model.named_modules() for leaf in packed_leaves(module)}


@pytest.mark.parametrize("how", ["save", "save_pretrained"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert", "t5", "mixtral"])
def test_saved_again(name: str, how: str, tmp_path: Path) -> None:
    model = filled(ARCHITECTURES[name], tmp_path)
    expected, weights = output(model), packed_weights(model)
    assert weights
    seedpack.save(model, tmp_path / "again") if how == "save" else model.save_pretrained(tmp_path / "again")
    if how == "save":
        assert (tmp_path / "again" / "seedpack.json").exists()
    for again in (seedpack.load(tmp_path / "again"), type(model).from_pretrained(tmp_path / "again")):
        assert packed_weights(again) == weights and torch.equal(output(again), expected)
    with Checkpoint(tmp_path / "again") as checkpoint:
        assert weights >= checkpoint.manifest.tensors.keys()


def test_dense_again(tmp_path: Path) -> None:
    model = filled(ARCHITECTURES["llama-tied"], tmp_path)
    expected = output(model)
    dense = model.dequantize()
    torch.testing.assert_close(output(dense), expected, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(output(type(model).from_pretrained(tmp_path / "dense")), expected, rtol=1e-4, atol=1e-5)


def test_in_a_module(tmp_path: Path) -> None:
    """The model is part of another module."""
    model = filled(lambda: nn.ModuleDict({"inner": llama(), "head": nn.Linear(32, 32)}), tmp_path)
    model["inner"].save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(output(again), output(model["inner"]))


def test_the_file_does_not_tie_what_the_config_ties(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {name: value.clone() for name, value in llama(tie_word_embeddings=False).state_dict().items()}
    seedpack.compress(state, tmp_path / "net.safetensors", codec=CODEC)
    model = seedpack.load(tmp_path / "net.safetensors", model=llama(tie_word_embeddings=True))
    seedpack.save(model, tmp_path / "again")
    assert torch.equal(output(seedpack.load(tmp_path / "again")), output(model))
