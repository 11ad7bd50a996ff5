"""Nothing that is missing is invented: every weight comes from the source, and every part from the checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import seedpack
from seedpack.converter.sources.open import open_source
from seedpack.errors import DigestError, FormatError, ModelError
from seedpack.formats import SafetensorsFile
from seedpack.hf.language_model import load_language_model
from seedpack.loader.fill import copy_
from tests.helpers.gguf import write_gguf
from tests.helpers.models import ARCHITECTURES, CODEC, Folders, llama, output


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(llama(tie_word_embeddings=True), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def packed(folders: Folders, tmp_path: Path) -> Path:
    """A packed folder of one's own."""
    shutil.copytree(folders.packed, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def again(folders: Folders, tmp_path: Path) -> Path:
    """A packed folder that transformers has saved again: its files have no manifest."""
    transformers.AutoModelForCausalLM.from_pretrained(folders.packed).save_pretrained(tmp_path / "again")
    return tmp_path / "again"


class TestSources:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_each_tensor_is_needed(self, tmp_path: Path, name: str) -> None:
        """A folder without one of its tensors is refused; the message names the parameter, or what becomes of it."""
        ARCHITECTURES[name]().save_pretrained(tmp_path / "dense")
        whole = load_file(tmp_path / "dense" / "model.safetensors")
        step = 1 if name == "llama" else 7
        for lost in sorted(whole)[::step]:
            save_file(
                {k: v for k, v in whole.items() if k != lost},
                tmp_path / "dense" / "model.safetensors",
                {"format": "pt"},
            )
            with pytest.raises(ModelError, match="lacks .*|its tensors do not make up a") as caught:
                seedpack.plan(tmp_path / "dense", codec=CODEC)
            if name != "mixtral":  # whose tensors have other names in memory
                assert lost.rpartition(".layers.")[2].rpartition(".layer.")[2] in str(caught.value)
        save_file(whole, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
        seedpack.plan(tmp_path / "dense", codec=CODEC)

    def test_a_layer_too_many(self, folders: Folders, tmp_path: Path) -> None:
        shutil.copytree(folders.dense, tmp_path / "dense")
        change_config(tmp_path / "dense", num_hidden_layers=3)
        with pytest.raises(
            ModelError, match=r"lacks model.layers.2.input_layernorm.weight, .* and 5 more; .*config.json"
        ):
            seedpack.compress(tmp_path / "dense", tmp_path / "out", codec=CODEC)
        assert not (tmp_path / "out").exists()

    def test_another_shape(self, folders: Folders, tmp_path: Path) -> None:
        shutil.copytree(folders.dense, tmp_path / "dense")
        change_config(tmp_path / "dense", intermediate_size=63)
        with pytest.raises(ModelError, match="its tensors do not make up a LlamaForCausalLM|has another shape of"):
            seedpack.compress(tmp_path / "dense", tmp_path / "out", codec=CODEC)

    def test_old_files(self, folders: Folders, tmp_path: Path) -> None:
        shutil.copytree(folders.dense, tmp_path / "dense")
        state = load_file(tmp_path / "dense" / "model.safetensors")
        (tmp_path / "dense" / "model.safetensors").unlink()
        torch.save(
            {k: v for k, v in state.items() if k != "model.norm.weight"}, tmp_path / "dense" / "pytorch_model.bin"
        )
        with pytest.raises(ModelError, match="lacks model.norm.weight"):
            seedpack.plan(tmp_path / "dense", codec=CODEC)

    @pytest.mark.parametrize("lost", ["blk.0.ffn_up.weight", "output_norm.weight"])
    def test_gguf(self, tmp_path: Path, lost: str) -> None:
        path = write_gguf(tmp_path / "tiny.gguf", without=lost)
        with pytest.raises(ModelError, match="tiny.gguf: lacks model.*weight"):
            seedpack.plan(path, codec=CODEC)

    @pytest.mark.parametrize("more", [1, 1 << 30])
    def test_a_gguf_of_more_blocks(self, tmp_path: Path, more: int) -> None:
        path = write_gguf(tmp_path / "tiny.gguf", more_blocks=more)
        with pytest.raises(ModelError, match="lacks model.layers.2|has 20 tensors for 1073741826 blocks"):
            seedpack.plan(path, codec=CODEC)

    def test_a_model_to_calibrate_or_to_score(self, folders: Folders, tmp_path: Path) -> None:
        """The source is checked when it is opened; a folder that is damaged after that is found when the model is opened."""
        shutil.copytree(folders.dense, tmp_path / "dense")
        source = open_source(tmp_path / "dense")
        change_tensors(tmp_path / "dense", lambda tensors: tensors.pop("model.norm.weight"))
        with pytest.raises(ModelError, match="lacks model.norm.weight"):
            source.open_model()
        with pytest.raises(ModelError, match="lacks model.norm.weight"):
            load_language_model(tmp_path / "dense")


class TestCheckpoints:
    def test_config_with_a_layer_too_many(self, packed: Path) -> None:
        change_config(packed, num_hidden_layers=3)
        with pytest.raises(ModelError, match=r"lacks .*model.layers.2.input_layernorm.weight"):
            seedpack.load(packed)
        with pytest.raises(ModelError, match=r"lacks 9 of the model's tensors, such as 'model.layers.2.input"):
            transformers.AutoModelForCausalLM.from_pretrained(packed)

    @pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.codes", "model.layers.0.self_attn.k_proj.weight"])
    def test_a_part_that_is_lost_in_a_folder_saved_again(self, again: Path, key: str) -> None:
        change_tensors(again, lambda tensors: tensors.update({key[:-1] + "x": tensors.pop(key)}))
        with pytest.raises((ModelError, FormatError), match=key):
            seedpack.load(again)
        with pytest.raises(ModelError, match=f"lacks 1 of the model's tensors, such as '{key}'"):
            transformers.AutoModelForCausalLM.from_pretrained(again)

    def test_a_raw_tensor_that_is_lost_in_a_folder_saved_again(self, again: Path) -> None:
        change_tensors(again, lambda tensors: tensors.pop("model.norm.weight"))
        with pytest.raises(ModelError, match="model.norm.weight"):
            seedpack.load(again)
        with pytest.raises(ModelError, match="model.norm.weight"):
            transformers.AutoModelForCausalLM.from_pretrained(again)

    @pytest.mark.parametrize("cls", ["AutoModel", "AutoModelForSequenceClassification"])
    def test_what_the_packed_architecture_has_is_needed_by_all(self, cls: str, packed: Path, again: Path) -> None:
        change_config(packed, num_hidden_layers=3)
        change_tensors(again, lambda tensors: tensors.pop("model.norm.weight"))
        for folder, name in ((packed, "layers.2"), (again, "norm.weight")):
            with pytest.raises(ModelError, match=f"lacks .* such as '.*{name}"):
                getattr(transformers, cls).from_pretrained(folder)

    def test_models_on_disk(self, packed: Path, again: Path, tmp_path: Path) -> None:
        change_config(packed, num_hidden_layers=3)
        change_tensors(again, lambda tensors: tensors.pop("model.norm.weight"))
        for folder, name in ((packed, "layers.2"), (again, "norm.weight")):
            with pytest.raises(ModelError, match=f"lacks .* such as '.*{name}"):
                transformers.AutoModelForCausalLM.from_pretrained(
                    folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload"
                )

    def test_counters_may_be_missing(self, tmp_path: Path) -> None:
        """Batch norms counted nothing before torch 0.4.1."""
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_channels=3)
        transformers.ResNetModel(config).save_pretrained(tmp_path / "dense")
        change_tensors(
            tmp_path / "dense", lambda tensors: [tensors.pop(k) for k in list(tensors) if "num_batches" in k]
        )
        seedpack.compress(tmp_path / "dense", tmp_path / "packed", codec=CODEC)
        for load in (seedpack.load, transformers.ResNetModel.from_pretrained):
            assert isinstance(load(tmp_path / "packed"), transformers.ResNetModel)

    def test_a_new_head_is_drawn_at_random(self, tmp_path: Path) -> None:
        """It is no loss that a file lacks what the packed architecture does not have: fine-tuning begins so."""
        folders = Folders(ARCHITECTURES["bert-encoder"](), tmp_path)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folders.packed, num_labels=3)
        assert model.classifier.weight.shape == (3, 32)
        with pytest.raises(ModelError, match="up_proj|query"):
            change_tensors(folders.packed, lambda tensors: tensors.pop("encoder.layer.1.attention.self.query.codes"))
            transformers.AutoModelForSequenceClassification.from_pretrained(folders.packed, num_labels=3)


class TestDigests:
    @pytest.mark.parametrize("saved", ["packed", "again"])
    def test_a_flipped_bit_is_refused_wherever_transformers_reads(
        self, saved: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path: Path = request.getfixturevalue(saved) / "model.safetensors"
        file = SafetensorsFile(path)
        file.close()
        with_digest = [info for info in file.header.tensors.values() if saved == "packed" or info.dtype[0] in "UI"]
        places = [file.header.data_start + i for info in with_digest for i in range(info.start, info.end)]
        content = bytearray(path.read_bytes())
        for place in torch.tensor(places)[torch.randperm(len(places))[:20]].tolist():
            content[place] ^= 1 << place % 8
            path.write_bytes(content)
            for load in (seedpack.load, transformers.AutoModelForCausalLM.from_pretrained):
                with pytest.raises(DigestError, match=r"tensor '.*', part '.*': its bytes changed"):
                    load(path.parent)
            content[place] ^= 1 << place % 8
        content[places[0]] ^= 1
        path.write_bytes(content)
        monkeypatch.setenv("SEEDPACK_VERIFY", "0")
        seedpack.load(path.parent)

    def test_weights_of_another_model(self, packed: Path, tmp_path: Path) -> None:
        torch.manual_seed(5)
        other = Folders(llama(tie_word_embeddings=True, initializer_range=0.5), tmp_path / "other")
        shutil.copyfile(other.packed / "model.safetensors", packed / "model.safetensors")
        with pytest.raises(FormatError, match="quantization_config is not that of the weight files"):
            transformers.AutoModelForCausalLM.from_pretrained(packed)

    def test_every_byte_of_the_header(self, packed: Path) -> None:
        path = packed / "model.safetensors"
        content = bytearray(path.read_bytes())
        length = 8 + int.from_bytes(content[:8], "little")
        for place in range(0, length, length // 40):
            content[place] ^= 2
            path.write_bytes(content)
            with pytest.raises(FormatError):
                transformers.AutoModelForCausalLM.from_pretrained(packed)
            content[place] ^= 2


class TestViews:
    """Packed layers are views of their file."""

    def test_a_copy_stands_apart(self, packed: Path) -> None:
        model = seedpack.load(packed, copy=True)
        expected = output(model)
        with (packed / "model.safetensors").open("r+b") as file:
            file.truncate(100)
        assert torch.equal(output(model), expected)

    def test_a_module_too(self, tmp_path: Path) -> None:
        net = torch.nn.Linear(64, 48)
        seedpack.compress(net, tmp_path / "net.safetensors", codec=CODEC)
        for how in ("copy", "copy_"):
            shutil.copyfile(tmp_path / "net.safetensors", tmp_path / "other")
            loaded = seedpack.load(tmp_path / "other", model=torch.nn.Linear(64, 48), copy=how == "copy")
            if how == "copy_":
                copy_(loaded)
            expected = loaded(torch.ones(64))
            with (tmp_path / "other").open("r+b") as file:
                file.write(bytes(4000))
            assert torch.equal(loaded(torch.ones(64)), expected)

    def test_our_own_writer_only_renames(self, folders: Folders, packed: Path) -> None:
        model = seedpack.load(packed)
        expected = output(model)
        seedpack.compress(folders.dense, packed, codec="svd", settings={"rank": 2}, force=True)
        assert torch.equal(output(model), expected)

    def test_a_checked_model_can_be_copied_and_kept(self, packed: Path, tmp_path: Path) -> None:
        model = seedpack.load(packed)
        torch.save(model, tmp_path / "model.pt")
        assert torch.equal(output(copy.deepcopy(model)), output(model))
