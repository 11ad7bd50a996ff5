"""Folders whose model is defined by Python code in them: it runs only where the caller asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

import seedpack
from seedpack.cli.main import cli
from seedpack.loader.layers import PackedModule
from tests.helpers.models import CODEC

CODE = """
from pathlib import Path
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

Path(__file__).with_name("ran").touch()

class OwnConfig(PreTrainedConfig):
    model_type = "of-its-own"
    def __init__(self, width=32, vocab_size=96, **kwargs):
        self.width, self.vocab_size = width, vocab_size
        super().__init__(**kwargs)

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed, self.norm = nn.Embedding(config.vocab_size, config.width), nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()
    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.head(self.norm(self.embed(input_ids))))
"""
IDS = torch.arange(12).view(1, 12)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "own_model.py").write_text(CODE)
    auto_map = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    config = {"model_type": "of-its-own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map, "width": 32}
    (dense / "config.json").write_text(json.dumps(config))
    state = {"embed.weight": torch.randn(96, 32), "head.weight": torch.randn(96, 32)}
    norm = {"norm.weight": torch.rand(32) + 0.5, "norm.bias": torch.randn(32)}
    from safetensors.torch import save_file

    save_file(state | norm, dense / "model.safetensors", {"format": "pt"})
    return dense


def ran(folder: Path) -> bool:
    return bool(list(folder.parent.rglob("ran")))


def test_packs_and_loads_where_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    report = seedpack.compress(folder, packed, codec=CODEC, trust_remote_code=True)
    assert {t.name for t in report.plan.tensors if t.packed} == {"embed.weight", "head.weight"}
    assert (packed / "own_model.py").read_text() == CODE
    seedpack.unpack(packed, tmp_path / "unpacked")
    auto = transformers.AutoModelForCausalLM
    expected = auto.from_pretrained(tmp_path / "unpacked", trust_remote_code=True)(IDS).logits
    for model in (
        auto.from_pretrained(packed, trust_remote_code=True),
        seedpack.load(packed, trust_remote_code=True),
    ):
        assert type(model).__name__ == "OwnForCausalLM" and isinstance(model.head, PackedModule)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = seedpack.load(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_does_not_run_where_it_is_not(folder: Path, tmp_path: Path) -> None:
    sentence = r"defined by Python code in its own folder \(own_model.py\), .* pass trust_remote_code=True"
    for work in (
        lambda: seedpack.compress(folder, tmp_path / "packed", codec=CODEC),
        lambda: seedpack.plan(folder, codec=CODEC),
    ):
        with pytest.raises(seedpack.SeedpackError, match=sentence):
            work()
    assert not ran(folder)
    seedpack.compress(folder, tmp_path / "packed", codec=CODEC, trust_remote_code=True)
    with pytest.raises(seedpack.SeedpackError, match=sentence):
        seedpack.load(tmp_path / "packed")


def test_command_line(folder: Path, tmp_path: Path) -> None:
    arguments = ["compress", str(folder), "-o", str(tmp_path / "packed"), "--codec", "seedlm"]
    refused = CliRunner().invoke(cli, arguments)
    assert refused.exit_code == 1 and "--trust-remote-code" in refused.output and not ran(folder)
    for more in (["--dry-run"], []):
        done = CliRunner().invoke(cli, [*arguments, *more, "--trust-remote-code"])
        assert done.exit_code == 0, done.output
    loaded = CliRunner().invoke(cli, ["load", str(tmp_path / "packed"), "--trust-remote-code"])
    assert loaded.exit_code == 0 and "OwnForCausalLM" in loaded.output
