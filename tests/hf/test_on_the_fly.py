"""Dense models that are packed while transformers loads them, and models in memory: as `compress` packs their folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import seedpack
from seedpack import SeedpackConfig
from seedpack.errors import ModelError
from seedpack.hf.on_the_fly import _gpu
from tests.helpers.models import ARCHITECTURES, SMALL, llama, output, tokenizer

BITS: dict[str, Any] = {"codec": "trellis", "bits": 3}


@pytest.fixture(autouse=True)
def nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    yield
    assert not list((tmp_path / "tmp").glob("seedpack-packed-*"))


def same_parts(found: Any, expected: Any) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys() and any(not value.is_floating_point() for value in a.values())
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert", "t5", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_parts_as_compress(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = ARCHITECTURES[name]().to(dtype)
    cls = type(model)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    seedpack.compress(tmp_path / "dense", tmp_path / "packed", **BITS)
    found = cls.from_pretrained(tmp_path / "dense", quantization_config=SeedpackConfig(**BITS))
    expected = cls.from_pretrained(tmp_path / "packed")
    same_parts(found, expected)
    assert found.dtype == expected.dtype == dtype and torch.get_default_dtype() == torch.float32
    assert torch.equal(output(found), output(expected))
    found.save_pretrained(tmp_path / "again")
    same_parts(cls.from_pretrained(tmp_path / "again"), expected)


def test_calibrated(tmp_path: Path) -> None:
    ids = torch.arange(64).reshape(2, 32) % 96
    options: dict[str, Any] = {**BITS, "calibration": ids}
    llama().save_pretrained(tmp_path / "dense")
    seedpack.compress(tmp_path / "dense", tmp_path / "packed", **options)
    config = SeedpackConfig(**options)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    same_parts(found, AutoModelForCausalLM.from_pretrained(tmp_path / "packed"))


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match="no such option: 'bit'"):
        SeedpackConfig(bit=3)
    with pytest.raises(seedpack.SeedpackError, match="must be from 1 to 8"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=SeedpackConfig(bits=9))
    with pytest.raises(ModelError, match="packs the files of a folder"):
        nowhere: Any = None
        config, state = transformers.LlamaConfig(**SMALL), llama().state_dict()
        transformers.LlamaForCausalLM.from_pretrained(
            nowhere, config=config, state_dict=state, quantization_config=SeedpackConfig(bits=3)
        )
    assert repr(SeedpackConfig(bits=3)).startswith("SeedpackConfig(CompressOptions(codec='trellis', bits=3.0")
    assert SeedpackConfig(bits=3).to_dict() == {"quant_method": "seedpack", "bits": "3.0"}


def test_a_packed_folder_keeps_its_own_config(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    seedpack.compress(tmp_path / "dense", tmp_path / "packed", **BITS)
    with pytest.warns(UserWarning, match="from the model will be used"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", quantization_config=SeedpackConfig(bits=8))
    same_parts(found, AutoModelForCausalLM.from_pretrained(tmp_path / "packed"))


def test_tensors_are_fitted_where_the_model_goes() -> None:
    assert _gpu({"": "cpu"}) is None and _gpu(None) is None and _gpu("cpu") is None
    assert _gpu({"a": "cpu", "b": 1}) == torch.device("cuda", 1)
    assert _gpu("cuda") == _gpu({"": "cuda:0"}) == torch.device("cuda", 0)


class TestModelsInMemory:
    @pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert", "t5"])
    def test_the_same_bytes_as_their_folder(self, name: str, tmp_path: Path) -> None:
        model = ARCHITECTURES[name]()
        model.save_pretrained(tmp_path / "dense")
        model = type(model).from_pretrained(tmp_path / "dense")
        seedpack.compress(tmp_path / "dense", tmp_path / "packed", **BITS)
        report = seedpack.compress(model, tmp_path / "live", **BITS)
        packed = {file.name for file in (tmp_path / "packed").iterdir()}
        assert {file.name for file in (tmp_path / "live").iterdir()} == packed and "config.json" in packed
        same_parts(type(model).from_pretrained(tmp_path / "live"), type(model).from_pretrained(tmp_path / "packed"))
        assert report.path == tmp_path / "live"

    def test_a_mixture(self, tmp_path: Path) -> None:
        model = ARCHITECTURES["mixtral"]()
        seedpack.compress(model, tmp_path / "live", bits=8)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "live")
        torch.testing.assert_close(output(found), output(model), rtol=0.1, atol=0.1)

    def test_a_file(self, tmp_path: Path) -> None:
        model = llama()
        seedpack.compress(model, tmp_path / "live.safetensors", **BITS)
        expected = seedpack.load(tmp_path / "live.safetensors", dense=True)
        filled = seedpack.load(tmp_path / "live.safetensors", model=llama())
        assert torch.equal(filled.lm_head.weight + 0, expected["lm_head.weight"])

    def test_its_tokenizer_goes_along(self, tmp_path: Path) -> None:
        seedpack.compress(llama(), tmp_path / "live", tokenizer=tokenizer(), **BITS)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "live")("a b")["input_ids"]
        with pytest.raises(ModelError, match="expected one of transformers, got a str"):
            seedpack.compress(llama(), tmp_path / "other", tokenizer="bert", **BITS)
        with pytest.raises(ModelError, match="tokenizer is for a transformers model in memory"):
            seedpack.compress(torch.nn.Linear(64, 64), tmp_path / "other", tokenizer=tokenizer(), **BITS)
        assert not (tmp_path / "other").exists()
