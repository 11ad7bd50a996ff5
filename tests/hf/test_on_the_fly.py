"""Dense models that are packed while transformers loads them, and models in memory: as `compress` packs their folder."""

from __future__ import annotations

import gc
import pickle  # noqa: TID251 (of what was made here)
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
    gc.collect()  # a failure keeps its frames
    assert not list((tmp_path / "tmp").glob("seedpack-packed-*"))


def same_parts(found: Any, expected: Any) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys() and any(not value.is_floating_point() for value in a.values())
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in ("llama", "llama-tied", "gpt2", "bert", "t5", "mixtral")),
        ("llama-tied", torch.bfloat16),
        pytest.param("mixtral", torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
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


def test_the_files_that_transformers_reads(tmp_path: Path) -> None:
    """A variant, and torch's own format, beside other weights."""
    model, other = llama(), llama()
    other.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "dense", variant="own")
    model.save_pretrained(tmp_path / "alone")
    torch.save(model.state_dict(), tmp_path / "dense" / "pytorch_model.bin")
    seedpack.compress(tmp_path / "alone", tmp_path / "packed", **BITS)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for how in ({"variant": "own"}, {"use_safetensors": False}):
        found = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=SeedpackConfig(**BITS), **how
        )
        same_parts(found, expected)


def test_another_model_than_the_folder_says(tmp_path: Path) -> None:
    """Fewer layers, the base model, and a new head: as dense ones load them."""
    llama().save_pretrained(tmp_path / "dense")
    seedpack.compress(tmp_path / "dense", tmp_path / "packed", **BITS)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")

    def load(cls: Any, **more: Any) -> Any:
        return cls.from_pretrained(tmp_path / "dense", quantization_config=SeedpackConfig(**BITS), **more)

    same_parts(load(AutoModelForCausalLM, num_hidden_layers=1).model.layers[0], expected.model.layers[0])
    same_parts(load(transformers.AutoModel), expected.model)
    classifier = load(transformers.AutoModelForSequenceClassification, num_labels=3)
    same_parts(classifier.model, expected.model)
    assert classifier.score.weight.shape == (3, 32)
    with pytest.raises(ModelError, match="lacks 9 of the model's tensors"):
        load(AutoModelForCausalLM, num_hidden_layers=3)


def test_models_can_be_pickled(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=SeedpackConfig(**BITS))
    assert torch.equal(output(pickle.loads(pickle.dumps(found))), output(found))


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
    keyed = SeedpackConfig(codec="mask", key=bytes(range(16)), exclude="*x*")
    assert keyed.to_dict().keys() == {"quant_method", "codec", "settings", "exclude"}
    assert "key" not in keyed.to_dict()["settings"] and "000102" not in repr(keyed)
    assert SeedpackConfig(bits=3).to_dict() == {"quant_method": "seedpack", "bits": 3.0}
    with pytest.raises(ModelError, match="dtype has no effect here; say dtype=… to from_pretrained"):
        SeedpackConfig(dtype="float16")
    with pytest.raises(ModelError, match="cannot stay on the disk"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense",
            quantization_config=SeedpackConfig(bits=3),
            device_map={"": "disk"},
            offload_folder=tmp_path,
        )


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

    def test_their_dtype_and_generation_config_are_those_of_now(self, tmp_path: Path) -> None:
        llama().half().save_pretrained(tmp_path / "dense")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").float()
        with torch.no_grad():
            model.model.norm.weight.mul_(1e5)
        model.generation_config.temperature = 0.5  # which transformers warns of, and refuses to save
        seedpack.compress(model, tmp_path / "live", **BITS)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "live")
        assert found.dtype == torch.float32 and torch.isfinite(output(found)).all()
        assert found.generation_config.temperature == 0.5

    def test_ties_are_those_of_the_values(self, tmp_path: Path) -> None:
        tied = llama(tie_word_embeddings=True)
        tied.lm_head.weight = torch.nn.Parameter(torch.randn(96, 32))
        with pytest.raises(
            ModelError, match="config ties 'lm_head.weight' to 'model.embed_tokens.weight', but their values"
        ):
            seedpack.compress(tied, tmp_path / "live", **BITS)
        untied = llama(tie_word_embeddings=False)
        untied.lm_head.weight = untied.model.embed_tokens.weight
        seedpack.compress(untied, tmp_path / "live", bits=8)
        torch.testing.assert_close(
            output(AutoModelForCausalLM.from_pretrained(tmp_path / "live")), output(untied), rtol=0.1, atol=0.01
        )

    def test_what_no_folder_of_theirs_could_hold(self, tmp_path: Path) -> None:
        extra, fewer = llama(), llama()
        extra.extra = torch.nn.Linear(64, 64)
        del fewer.model.layers[1]
        for model, message in (
            (extra, r"'extra.bias' is a tensor \[64\], and by its config not there"),
            (fewer, "is not there"),
        ):
            with pytest.raises(ModelError, match=message):
                seedpack.compress(model, tmp_path / "live", **BITS)
        seedpack.compress(extra, tmp_path / "live.safetensors", **BITS)
        compiled: Any = torch.compile(llama())
        seedpack.compress(compiled, tmp_path / "compiled", **BITS)
        assert (tmp_path / "compiled" / "config.json").is_file()
        with pytest.raises(ModelError, match="without data .on the meta device, or offloaded.; load the model whole"):
            seedpack.compress(llama().to("meta"), tmp_path / "live", **BITS)

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
