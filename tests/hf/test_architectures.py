"""Every architecture: load, run, save, load again, make dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import seedpack
from seedpack.formats import Checkpoint
from seedpack.loader.layers import PackedLinear, memory_name
from tests.helpers.models import ARCHITECTURES, Folders, output

MIXTURES = {"mixtral", "qwen3-moe"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str, tmp_path: Path) -> None:
    folders = Folders(ARCHITECTURES[name](), tmp_path)
    options = {"experts_implementation": "eager"} if name in MIXTURES else {}
    expected = output(folders.reference(**options))

    left_raw = [t.name for t in folders.report.plan.tensors if not t.packed and len(t.shape) > 1]
    assert all(name.endswith(("gate.weight", ".wo.weight")) for name in left_raw), "only routers stay raw"

    model, info = folders.cls.from_pretrained(folders.packed, output_loading_info=True)
    assert not any(info.values()), info
    if name in MIXTURES:  # each projection is a product of its own, which sums in another order
        torch.testing.assert_close(output(model), expected)
        expected = output(model)
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
    if name in MIXTURES:
        expected = output(folders.reference(**options))
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
    names = [memory_name(part) for part in embedding.part_names]
    assert all(getattr(head, name) is getattr(embedding, name) for name in names)


def test_memory_of_a_packed_mixture(tmp_path: Path) -> None:
    folders = Folders(ARCHITECTURES["mixtral"](), tmp_path)
    packed, dense = (folders.cls.from_pretrained(p).get_memory_footprint() for p in (folders.packed, folders.decoded))
    assert packed < 0.2 * dense


def test_experts_must_be_packed_alike(tmp_path: Path) -> None:
    for pattern in ("*layers.0*experts.2.w1*", "*layers.0.*experts*", "*.w1.*"):
        with pytest.raises(seedpack.SeedpackError, match="experts must be packed alike"):
            Folders(ARCHITECTURES["mixtral"](), tmp_path, exclude=[pattern])


def test_inputs_cast_to_the_weights_dtype(tmp_path: Path) -> None:
    folders = Folders(ARCHITECTURES["t5"](), tmp_path)  # its feed-forward casts to the dtype of `wo.weight`
    model = folders.cls.from_pretrained(folders.packed)
    assert isinstance(model.decoder.block[0].layer[-1].DenseReluDense.wo, PackedLinear)
    torch.testing.assert_close(output(model), output(folders.reference()), rtol=1e-4, atol=1e-4)


def test_packed_mixtures_can_be_cast(tmp_path: Path) -> None:
    folders = Folders(ARCHITECTURES["mixtral"](), tmp_path)
    model = folders.cls.from_pretrained(folders.packed).to(torch.bfloat16)
    assert output(model).dtype == torch.bfloat16


def test_damaged_experts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    folders = Folders(ARCHITECTURES["mixtral"](), tmp_path)
    state = load_file(folders.packed / "model.safetensors")
    name = next(name for name in state if "experts" in name and name.endswith("exponent_bias"))
    state[name] = torch.tensor([127], dtype=torch.int8)
    save_file(state, folders.packed / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("SEEDPACK_VERIFY", "0")  # the digests would tell before
    with pytest.raises(seedpack.SeedpackError, match="exponent bias 127 is not in"):
        folders.cls.from_pretrained(folders.packed)


def test_ties_follow_what_is_stored(tmp_path: Path) -> None:
    """Only the head stored: it is the embedding. Both stored with different values: refused."""
    from safetensors.torch import save_file

    ARCHITECTURES["llama-tied"]().save_pretrained(tmp_path / "dense")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    embedding = state.pop("model.embed_tokens.weight")
    save_file(
        {**state, "lm_head.weight": embedding}, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"}
    )
    seedpack.compress(tmp_path / "dense", tmp_path / "packed", codec="svd", settings={"rank": 32})
    found = seedpack.load(tmp_path / "packed").get_input_embeddings().dense_weight()
    torch.testing.assert_close(found, embedding, rtol=1e-2, atol=1e-3)
    both = {**state, "lm_head.weight": embedding, "model.embed_tokens.weight": embedding + 1}
    save_file(both, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(seedpack.SeedpackError, match="ties 'lm_head.weight' to .* but their values differ"):
        seedpack.compress(tmp_path / "dense", tmp_path / "other")


def test_one_projection_of_the_experts_left_dense(tmp_path: Path) -> None:
    folders = Folders(ARCHITECTURES["mixtral"](), tmp_path, exclude=["*.w2.weight"])
    model = folders.cls.from_pretrained(folders.packed)
    torch.testing.assert_close(output(model), output(folders.reference(experts_implementation="eager")))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(output(folders.cls.from_pretrained(tmp_path / "again")), output(model))


def test_the_base_of_a_mixture_is_saved_again(tmp_path: Path) -> None:
    """Without the prefix that the whole model gives its names."""
    import transformers

    folders = Folders(ARCHITECTURES["mixtral"](), tmp_path)
    base: Any = transformers.MixtralModel.from_pretrained(folders.packed)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(output(transformers.MixtralModel.from_pretrained(tmp_path / "base")), output(base))
