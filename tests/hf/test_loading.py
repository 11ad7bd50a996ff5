"""The ways transformers is used around a packed model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import seedpack
from seedpack.errors import FormatError, ModelError
from seedpack.loader.layers import PackedLinear
from tests.helpers.models import ARCHITECTURES, IDS, Folders, llama, output


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(llama(tie_word_embeddings=True), tmp_path_factory.mktemp("llama"))


def test_generates_the_same_text(folders: Folders) -> None:
    prompt = IDS[:1, 3:8]
    expected = folders.reference().generate(prompt, max_new_tokens=10, do_sample=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders.packed)
    assert torch.equal(model.generate(prompt, max_new_tokens=10, do_sample=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(folders: Folders, dtype: torch.dtype) -> None:
    model = seedpack.load(folders.packed, dtype=dtype)
    assert model.dtype == dtype and model.model.layers[0].mlp.up_proj.dense_weight().dtype == dtype
    expected = output(folders.reference(dtype=dtype))
    found = output(model)
    assert found.dtype == expected.dtype == dtype
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    assert difference < 4 * torch.finfo(dtype).eps  # packed products keep their weights in float32


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(folders: Folders, device_map: Any) -> None:
    model = seedpack.load(folders.packed, device_map=device_map)
    assert torch.equal(output(model), output(folders.reference()))


def test_disk_offload(folders: Folders, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu",
                  "model.layers.0": "disk", "model.layers.1": "cpu"}  # fmt: skip
    model = seedpack.load(folders.packed, device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(output(model), output(folders.reference()))


def test_shards(tmp_path: Path) -> None:
    folders = Folders(llama(tie_word_embeddings=False), tmp_path, shard_bytes=6000)
    assert len(list(folders.packed.glob("*.safetensors"))) > 2
    model = seedpack.load(folders.packed)
    assert torch.equal(output(model), output(folders.reference()))
    model.save_pretrained(tmp_path / "again", max_shard_size="5KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    assert torch.equal(output(seedpack.load(tmp_path / "again")), output(model))


def test_sharded_source(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for name in ("whole", "shards"):
        seedpack.compress(tmp_path / name, tmp_path / f"{name}-packed", codec="svd", settings={"rank": 4})
    whole, shards = (seedpack.load(tmp_path / f"{name}-packed", dense=True) for name in ("whole", "shards"))
    assert whole.keys() == shards.keys() and all(torch.equal(whole[n], shards[n]) for n in whole)


def test_old_bin_folder(folders: Folders, tmp_path: Path) -> None:
    state = transformers.LlamaForCausalLM.from_pretrained(folders.dense).state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folders.dense / "config.json").read_bytes())
    seedpack.compress(tmp_path, tmp_path / "packed", codec=folders.report.tensors[0].plan.codec)
    assert torch.equal(output(seedpack.load(tmp_path / "packed")), output(folders.reference()))


def test_further_files_come_along(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    (tmp_path / "dense" / "optimizer.pt").write_text("large")
    seedpack.compress(tmp_path / "dense", tmp_path / "packed", codec="svd", settings={"rank": 2}, dtype="bfloat16")
    names = sorted(os.listdir(tmp_path / "packed"))
    assert names == ["config.json", "generation_config.json", "model.safetensors", "seedpack.json", "tokenizer.json"]
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and seedpack.load(tmp_path / "packed").dtype == torch.bfloat16


def test_training_reaches_what_is_not_packed(folders: Folders) -> None:
    model = seedpack.load(folders.packed)
    model(IDS, labels=IDS).loss.backward()
    assert model.model.norm.weight.grad is not None
    assert all(p.grad is None for m in model.modules() if isinstance(m, PackedLinear) for p in m.parameters())


def test_compiles_whole(folders: Folders) -> None:
    model = seedpack.load(folders.packed)
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS), output(model), rtol=1e-5, atol=1e-5)


def test_without_seedpack_loading_fails_loudly(folders: Folders) -> None:
    code = (
        "import transformers, sys\n"
        f"try: transformers.AutoModelForCausalLM.from_pretrained({str(folders.packed)!r})\n"
        "except Exception as e: print(type(e).__name__); sys.exit(0)\n"
        "print('loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "RuntimeError", done.stderr


def copy_with_config(folders: Folders, tmp_path: Path, change: Any) -> Path:
    import shutil

    shutil.copytree(folders.packed, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return tmp_path / "copy"


def test_damaged_config(folders: Folders, tmp_path: Path) -> None:
    path = copy_with_config(folders, tmp_path, lambda c: c["quantization_config"].update(extra=1))
    with pytest.raises(FormatError, match="unknown keys"):
        transformers.AutoModelForCausalLM.from_pretrained(path)


def test_wrong_architecture(folders: Folders, tmp_path: Path) -> None:
    path = copy_with_config(folders, tmp_path, lambda c: c.update(num_hidden_layers=1))
    with pytest.raises(
        ModelError, match="LlamaForCausalLM has no layer for 7 of the packed tensors, such as 'model.layers.1"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(ModelError, match="LlamaModel has no layer for 7 of the packed tensors"):
        transformers.AutoModel.from_pretrained(path)
    other = copy_with_config(folders, tmp_path / "b", lambda c: c.update(intermediate_size=80))
    with pytest.raises(ModelError, match=r"the checkpoint has shape \[.*, the model \["):
        transformers.AutoModelForCausalLM.from_pretrained(other)


def test_encoder_from_a_model_with_head(tmp_path: Path) -> None:
    """A base model out of a checkpoint with a head: names lose their prefix, the head is not wanted."""
    folders = Folders(ARCHITECTURES["bert"](), tmp_path, exclude=["cls.*"])
    encoder = transformers.BertModel.from_pretrained(folders.packed, add_pooling_layer=False)
    reference = transformers.BertModel.from_pretrained(folders.decoded, add_pooling_layer=False)
    assert torch.equal(output(encoder), output(reference))


def test_lora_trains_on_packed_layers(folders: Folders, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = seedpack.load(folders.packed)
    before = {n: p.clone() for n, p in base.named_parameters() if not p.is_floating_point()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(after[n], p) for n, p in before.items()), "packed parts do not change"
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    fresh = peft.PeftModel.from_pretrained(seedpack.load(folders.packed), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(fresh(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
