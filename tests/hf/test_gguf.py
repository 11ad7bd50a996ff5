"""A GGUF file of our own making, read through transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import seedpack
from seedpack.converter.sources.open import open_source
from seedpack.errors import ModelError
from tests.helpers.gguf import write_gguf
from tests.helpers.models import CODEC, IDS

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_gguf_becomes_a_packed_folder(file: Path, tmp_path: Path) -> None:
    seedpack.compress(file, tmp_path / "packed", codec=CODEC)
    names = {p.name for p in (tmp_path / "packed").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    model = seedpack.load(tmp_path / "packed")
    source = open_source(file)
    packed = {name for name, t in source.tensors.items() if t.kind}
    assert "model.embed_tokens.weight" in packed and "lm_head.weight" not in source.tensors
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()
    norm = source.read("model.norm.weight")
    assert torch.equal(model.model.norm.weight, norm)


def test_a_tokenizer_that_cannot_be_converted_is_left_out(tmp_path: Path) -> None:
    source = open_source(write_gguf(tmp_path / "odd.gguf", merges="no such"))
    assert source.dropped == ["its tokenizer, which transformers cannot convert,"]
    seedpack.compress(source, tmp_path / "odd", codec=CODEC)
    assert not (tmp_path / "odd" / "tokenizer.json").exists()


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ModelError, match=r"x.gguf: transformers cannot read it"):
        open_source(tmp_path / "x.gguf")
