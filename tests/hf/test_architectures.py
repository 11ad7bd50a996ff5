"""Every architecture: load, run, save, load again, make dense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import seedpack
from seedpack.formats import Checkpoint
from tests.hf.models import ARCHITECTURES, Folders, output

MIXTURES = {"mixtral", "qwen3-moe"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str, tmp_path: Path) -> None:
    folders = Folders(ARCHITECTURES[name](), tmp_path)
    options = {"experts_implementation": "eager"} if name in MIXTURES else {}
    expected = output(folders.reference(**options))

    left_raw = [t.name for t in folders.report.plan.tensors if not t.packed and len(t.shape) > 1]
    assert all(part in tensor for tensor in left_raw for part in ["gate.weight"]), "only routers stay raw"

    model, info = folders.cls.from_pretrained(folders.packed, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(output(model), expected)
    assert type(seedpack.load(folders.packed)) is folders.cls
    assert torch.equal(output(seedpack.load(folders.packed)), expected)

    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(p / "model.safetensors") for p in (folders.packed, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first)
    with Checkpoint(tmp_path / "again") as checkpoint:
        assert not [error for _, error in checkpoint.verify() if error]
    again = folders.cls.from_pretrained(tmp_path / "again")
    assert torch.equal(output(again), expected)

    dense = again.dequantize()
    assert torch.equal(output(dense), expected)
    assert not hasattr(dense.config, "quantization_config")
    dense.save_pretrained(tmp_path / "dequantized")
    assert torch.equal(output(folders.cls.from_pretrained(tmp_path / "dequantized", **options)), expected)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_tied_embeddings_are_packed_once(name: str, tmp_path: Path) -> None:
    folders = Folders(ARCHITECTURES[name](), tmp_path)
    with Checkpoint(folders.packed) as checkpoint:
        assert not any("lm_head" in tensor for tensor in checkpoint.manifest.tensors)
    model = folders.cls.from_pretrained(folders.packed)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert all(getattr(head, part) is getattr(embedding, part) for part in embedding.part_names)


def test_memory_of_a_packed_mixture(tmp_path: Path) -> None:
    folders = Folders(ARCHITECTURES["mixtral"](), tmp_path)
    packed, dense = (folders.cls.from_pretrained(p).get_memory_footprint() for p in (folders.packed, folders.decoded))
    assert packed < 0.2 * dense


def test_experts_must_be_packed_alike(tmp_path: Path) -> None:
    folders = Folders(ARCHITECTURES["mixtral"](), tmp_path, exclude=["*layers.0*experts.2.w1*"])
    with pytest.raises(seedpack.SeedpackError, match="w1 has 3 of 4 packed"):
        folders.cls.from_pretrained(folders.packed)


def test_one_projection_of_the_experts_left_dense(tmp_path: Path) -> None:
    folders = Folders(ARCHITECTURES["mixtral"](), tmp_path, exclude=["*.w2.weight"])
    model = folders.cls.from_pretrained(folders.packed)
    assert torch.equal(output(model), output(folders.reference(experts_implementation="eager")))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(output(folders.cls.from_pretrained(tmp_path / "again")), output(model))
