from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import seedpack
from seedpack.api import unpack
from tests.helpers.models import llama


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folders(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("llama")
    llama(tie_word_embeddings=request.param, intermediate_size=160, vocab_size=192).save_pretrained(path / "dense")
    seedpack.compress(path / "dense", path / "packed", bits=3.9, settings={"effort": "fast"})
    return path / "dense", path / "packed"


def test_packed_logits_are_the_unpacked_model_s(folders: tuple[Path, Path], tmp_path: Path) -> None:
    unpack(folders[1], tmp_path / "dense")
    ids = torch.randint(3, 96, (2, 9))
    packed = AutoModelForCausalLM.from_pretrained(folders[1])
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)
    gradients = []
    for model in (packed, dense):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3)


def test_saved_again_it_is_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    model.save_pretrained(tmp_path / "again")
    again, first = (seedpack.load(path, dense=True) for path in (tmp_path / "again", folders[1]))
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_half_precision(folders: tuple[Path, Path]) -> None:
    ids = torch.randint(3, 96, (1, 9))
    with torch.no_grad():
        full, half = (
            AutoModelForCausalLM.from_pretrained(folders[1], dtype=dtype)(ids).logits
            for dtype in (torch.float32, torch.bfloat16)
        )
    assert half.dtype == torch.bfloat16
    assert float((half.float() - full).norm() / full.norm()) < 0.05


def test_compiled_without_a_break(folders: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[1]).eval()
    layer = model.model.layers[0].mlp
    x = torch.randn(1, 4, 32)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
