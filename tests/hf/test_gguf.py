"""GGUF files of our own making: their tensors are those of the model that transformers loads, and are read one at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import seedpack
from seedpack.converter.sources.base import Source
from seedpack.converter.sources.open import open_source
from seedpack.errors import ModelError
from seedpack.hf import gguf as sources
from tests.helpers.gguf import write_gguf
from tests.helpers.gguf_models import CONFIGS, QUANTISED, write_model
from tests.helpers.marks import slow_but
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


def read_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """The source of a file whose model transformers loads."""
    with monkeypatch.context() as patch:
        patch.setattr(sources, "converts_gguf_at_once", lambda architecture: True)
        source = open_source(path)
    assert source.notes == [sources.WHOLE]
    return source


def require_same(source: Source, whole: Source) -> None:
    assert source.config == whole.config and source.input_bytes == whole.input_bytes
    assert list(source.tensors) == list(whole.tensors)
    for name, tensor in source.tensors.items():
        assert replace(tensor, stored_bytes=None) == whole.tensors[name]
        assert torch.equal(source.read(name), whole.read(name)), name
        assert source.parameters(name) == whole.parameters(name)
        power, expected = source.norm_power(name), whole.norm_power(name)
        assert power is expected is None or (
            power is not None and expected is not None and torch.equal(power, expected)
        )


@pytest.mark.parametrize("architecture", slow_but(["llama", "gpt2", "gemma3", "qwen3moe"], CONFIGS))
def test_tensors_are_those_that_transformers_loads(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "model.gguf", architecture, ("F32", *QUANTISED))
    source = open_source(path)
    assert isinstance(source, sources.GGUFSource) and source.notes == ["Q4_0, Q8_0, dequantised to F32"]
    require_same(source, read_whole(path, monkeypatch))


def test_blocks_of_256_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "tie_word_embeddings": True}
    path = write_model(tmp_path / "model.gguf", "llama", ("Q4_K", "Q6_K"), **more)
    source = open_source(path)
    assert source.notes == ["Q4_K, Q6_K, dequantised to F32"] and "lm_head.weight" not in source.tensors
    stored = sum(tensor.source_bytes for tensor in source.tensors.values())
    assert stored < path.stat().st_size < stored + 10_000
    monkeypatch.setattr(sources, "VALUES_AT_ONCE", 3000)  # several pieces a tensor, the last one shorter
    require_same(source, read_whole(path, monkeypatch))


def test_the_output_is_that_of_the_whole_model(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"codec": CODEC, "calibration": seedpack.Calibration("self", tokens=64, context=16)}
    seedpack.compress(file, tmp_path / "packed", **options)
    seedpack.compress(read_whole(file, monkeypatch), tmp_path / "whole", **options)
    names = sorted(path.name for path in (tmp_path / "packed").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in names:
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_head_that_its_architecture_ties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon's config ties, whatever the file holds: a head of the same values is stored once; what to make of another one,
    transformers tells by loading the model."""
    path = write_model(tmp_path / "tied.gguf", "falcon", head="same")
    source = open_source(path)
    assert isinstance(source, sources.GGUFSource) and "lm_head.weight" not in source.tensors
    require_same(source, read_whole(path, monkeypatch))
    apart = open_source(write_model(tmp_path / "apart.gguf", "falcon", head="other"))
    assert apart.notes == [sources.WHOLE] and "lm_head.weight" in apart.tensors


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="tiny.gguf changed while the model was being read"):
        source.read("model.norm.weight")


def test_a_tokenizer_that_cannot_be_converted_is_left_out(tmp_path: Path) -> None:
    source = open_source(write_gguf(tmp_path / "odd.gguf", merges="no such"))
    assert source.dropped == ["its tokenizer, which transformers cannot convert,"]
    seedpack.compress(source, tmp_path / "odd", codec=CODEC)
    assert not (tmp_path / "odd" / "tokenizer.json").exists()


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ModelError, match=r"x.gguf: transformers cannot read it"):
        open_source(tmp_path / "x.gguf")
