"""The private parts of transformers are where `seedpack.hf.internals` looks for them, and nowhere else are they used."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import transformers
from packaging.specifiers import SpecifierSet

from seedpack.hf import internals
from tests.helpers.models import llama

ROOT = Path(__file__).resolve().parent.parent.parent
PRIVATE = re.compile(
    r"core_model_loading|conversion_mapping\b|quantizers\.auto|AUTO_QUANTI|GradientCheckpointingLayer"
    r"|modeling_gguf|GGUF_ARCHS|_tied_weights_keys|_is_hf_initialized|_original_source_patterns"
)


def test_installed_version_is_within_the_bounds() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (bounds,) = (text.removeprefix("transformers") for text in dependencies if text.startswith("transformers"))
    assert transformers.__version__ in SpecifierSet(bounds)
    lower, upper = re.findall(r"5\.(\d+)", bounds)
    assert f"from 5.{lower} to 5.{int(upper) - 1}" in " ".join((internals.__doc__ or "").split())


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("quantizers.auto", ["AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"]),
        ("conversion_mapping", ["get_model_conversion_mapping"]),
        ("core_model_loading", ["WeightConverter", "MergeModulelist", "SplitModulelist", "rename_source_key"]),
        ("modeling_layers", ["GradientCheckpointingLayer"]),
        (
            "modeling_gguf_pytorch_utils",
            ["load_gguf_checkpoint", "TensorProcessor", "TENSOR_PROCESSORS", "get_gguf_hf_weights_map"],
        ),
    ],
)
def test_names_exist(module: str, names: list[str]) -> None:
    assert all(hasattr(import_module(f"transformers.{module}"), name) for name in names)


def test_architectures_of_gguf_that_are_converted_at_once() -> None:
    found = {name for name in ("llama", "gemma3", "qwen3moe", "lfm2") if internals.converts_gguf_at_once(name)}
    assert found <= {"lfm2"}


def test_ties_can_be_replaced_and_put_back() -> None:
    model = llama(tie_word_embeddings=True)
    before, saved = internals.tied_parameters(model), model._tied_weights_keys
    assert before == {"lm_head.weight": "model.embed_tokens.weight"}
    parts = {"lm_head.packed": "model.embed_tokens.packed"}
    internals.replace_ties(model, list(before), parts)
    assert internals.tied_parameters(model) == model._tied_weights_keys == parts
    internals.replace_ties(model, list(parts), before)
    assert internals.tied_parameters(model) == before and model._tied_weights_keys == saved


def test_private_parts_are_used_in_one_file() -> None:
    files = [path for path in (ROOT / "seedpack").rglob("*.py") if PRIVATE.search(path.read_text())]
    assert [path.name for path in files] == ["internals.py"]
