"""Shares of a model's tensors, fitted apart and merged."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import seedpack
from seedpack.cli.main import cli
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.options import Calibration
from seedpack.converter.pipeline import fit_shard, merge
from seedpack.converter.shards import Shard
from seedpack.errors import ModelError, NonfiniteError, OptionError, OutputError
from seedpack.formats.lock import locked
from tests.helpers.models import llama

OPTIONS: dict[str, Any] = {"codec": "trellis", "settings": {"effort": "fast"}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net = nn.Sequential(*(nn.Linear(64, 48 + 16 * i) for i in range(7)))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_every_tensor_is_in_one_share(model: Path) -> None:
    plan = seedpack.plan(model, **OPTIONS)
    shares = [Shard(number, 3).of(plan) for number in (1, 2, 3)]
    assert sorted(name for share in shares for name in share) == sorted(t.name for t in plan.tensors if t.packed)
    weights = [sum(math.prod(t.shape) for t in plan.tensors if t.name in share) for share in shares]
    assert max(weights) < 1.25 * min(weights)


def test_merged_they_are_what_one_run_gives(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    seedpack.compress(model, whole, **OPTIONS)
    fitted = [len(fit_shard(model, output, **OPTIONS, shard=Shard(n, 2))) for n in (1, 2)]
    assert sum(fitted) == 7 and not output.exists()
    monkeypatch.setattr(TrellisCodec, "encode", None)  # nothing is left to fit
    report = merge(model, output, **OPTIONS)
    assert output.read_bytes() == whole.read_bytes() and len(report.tensors) == 7
    assert sorted(os.listdir(tmp_path)) == ["net.pt", "out.safetensors", "whole.safetensors"]


def test_the_source_is_not_read_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors that are packed: merging a model of terabytes must not hash it."""
    from seedpack.converter.sources.base import Source

    output = tmp_path / "out.safetensors"
    for number in (1, 2):
        fit_shard(model, output, **OPTIONS, shard=Shard(number, 2))
    read, seen = Source.read, list[str]()

    def recorded(self: Source, name: str) -> torch.Tensor:
        seen.append(name)
        return read(self, name)

    monkeypatch.setattr(Source, "read", recorded)
    merge(model, output, **OPTIONS)
    assert sorted(seen) == [f"{i}.bias" for i in range(7)]


def test_a_share_that_is_missing(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    fit_shard(model, output, **OPTIONS, shard=Shard(1, 3))
    with pytest.raises(ModelError, match=r"[45] tensors of 7 are not fitted yet, such as '.*'; run their shards"):
        merge(model, output, **OPTIONS)
    assert not output.exists()


@pytest.mark.parametrize("sequential", [False, True])
def test_calibrated_by_one_for_all(tmp_path: Path, sequential: bool) -> None:
    model, output = tmp_path / "dense", tmp_path / "out"
    llama().save_pretrained(model)
    ids = torch.arange(128).reshape(4, 32) % 64
    options = {
        **OPTIONS,
        "bits": 3.3,
        "calibration": Calibration(ids, context=32, sequential=sequential, measure=False),
    }
    seedpack.compress(model, tmp_path / "whole", **options)
    for number in (2, 1):
        fit_shard(model, output, **options, shard=Shard(number, 2))
    merge(model, output, **options)
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_what_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, shard = tmp_path / "out.safetensors", Shard(1, 2)
    with pytest.raises(ModelError, match="this one is in memory"):
        fit_shard(nn.Linear(64, 64), output, **OPTIONS, shard=shard)
    with (
        locked(tmp_path / ".out.safetensors.partial" / "shard-1", "", ""),
        pytest.raises(OutputError, match="another run fits shard 1/2"),
    ):
        fit_shard(model, output, **OPTIONS, shard=shard)
    seedpack.compress(model, output, **OPTIONS)
    with pytest.raises(OutputError, match="exists already"):
        fit_shard(model, output, **OPTIONS, shard=shard)
    for text in ("3", "0/4", "5/4", "1/0", "a/b", "-1/2"):
        with pytest.raises(OptionError, match="expected"):
            Shard.parse(text)
    with pytest.raises(OptionError, match="the plan packs 7 tensors; ask for no more shards"):
        fit_shard(model, tmp_path / "other.safetensors", **OPTIONS, shard=Shard(1, 8))
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(OptionError, match="expected numbers in RANK and WORLD_SIZE"):
        Shard.parse("env")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Shard.parse("env") == Shard(4, 8) == Shard.parse("4/8")


def test_the_commands(model: Path, tmp_path: Path) -> None:
    def run(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.output

    output, command = (
        tmp_path / "out.safetensors",
        ["compress", model, "-o", tmp_path / "out.safetensors", "--effort", "fast"],
    )
    assert "no shard of it was begun here" in run("merge", output, code=1)
    text = run(*command, "--shard", "1/2")
    assert "shard 1/2: 4 tensors fitted; once all 2 are:" in text or "shard 1/2: 3 tensors fitted" in text
    assert f"next: seedpack merge {output}" in text.replace("\n", "")
    assert "shards were begun with another bits" in run(*command, "--bits", 3, "--shard", "2/2", code=2).replace(
        "\n", " "
    )
    assert "are not fitted yet" in run("merge", output, code=1)
    assert json.loads(run(*command, "--shard", "2/2", "--jobs", 1, "--json"))["shard"] == "2/2"
    assert "Packed" in run("merge", output)
    seedpack.compress(model, tmp_path / "whole.safetensors", **OPTIONS)
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not (tmp_path / ".out.safetensors.partial").exists()


def test_equal_tensors_and_copied_models(tmp_path: Path) -> None:
    """What is found by its bytes is found by its place from then on."""
    same = torch.randn(64, 96)
    torch.save({"a.weight": same, "b.weight": same.clone()}, tmp_path / "net.pt")
    output = tmp_path / "out.safetensors"
    fit_shard(tmp_path / "net.pt", output, **OPTIONS, shard=Shard(1, 1))
    os.utime(tmp_path / "net.pt")
    with pytest.raises(ModelError, match="are not fitted yet"):
        merge(tmp_path / "net.pt", output, **OPTIONS)
    fit_shard(tmp_path / "net.pt", output, **OPTIONS, shard=Shard(1, 1))
    assert len(merge(tmp_path / "net.pt", output, **OPTIONS).tensors) == 2


def test_a_model_that_changes_under_what_is_kept(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    for number in (1, 2):
        fit_shard(model, output, **OPTIONS, shard=Shard(number, 2))

    def change(stage: str, *rest: Any) -> None:
        if stage == "Fitting" and rest[3:4] == ("3.weight",):
            torch.save({name: value + 1 for name, value in torch.load(model).items()}, model)

    with pytest.raises(ModelError, match="changed while the model was being read"):
        merge(model, output, **OPTIONS, progress=change)
    assert not output.exists()


def test_damage_is_not_mended_by_a_merge(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    fit_shard(model, output, **OPTIONS, shard=Shard(1, 1))
    entry = sorted((tmp_path / ".out.safetensors.partial" / "kept").glob("*.safetensors"))[0]
    entry.write_bytes(entry.read_bytes()[:-1])
    with pytest.raises(ModelError, match="what a shard has kept of it is damaged; run that shard again"):
        merge(model, output, **OPTIONS)
    fit_shard(model, output, **OPTIONS, shard=Shard(1, 1))
    merge(model, output, **OPTIONS)


def test_values_are_those_of_one_state_dict(tmp_path: Path) -> None:
    """A file may hold several, of the same names."""
    good, bad = (
        {"w.weight": torch.randn(64, 96), "v.weight": torch.randn(64, 96)},
        {"w.weight": torch.randn(64, 96), "v.weight": torch.full((64, 96), torch.nan)},
    )
    torch.save({"model": good, "ema": bad}, tmp_path / "net.pt")
    output = tmp_path / "out.safetensors"
    fit_shard(tmp_path / "net.pt", output, **OPTIONS, shard=Shard(1, 2), state_key="model")
    with pytest.raises(NonfiniteError, match="in 1 tensor: v.weight"):
        for number in (1, 2):
            fit_shard(tmp_path / "net.pt", output, **OPTIONS, shard=Shard(number, 2), state_key="ema")


def test_the_output_waits_for_shards(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    fit_shard(model, output, **OPTIONS, shard=Shard(1, 1))
    with (
        locked(tmp_path / ".out.safetensors.partial" / "shard-2", "", ""),
        pytest.raises(OutputError, match="its shard 2 is still being fitted"),
    ):
        merge(model, output, **OPTIONS)


def test_a_private_key_is_for_one_process(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="each shard would draw a seed of its own"):
        fit_shard(model, tmp_path / "out.safetensors", codec="basis", key=bytes(16), shard=Shard(1, 2))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 1}', '{"model": "m", "state": "", "options": {"bits": 3}}'])
def test_the_record_of_another(model: Path, tmp_path: Path, text: str) -> None:
    """Is no command to follow: neither damaged, nor with options that say what to trust."""
    record = tmp_path / ".out.safetensors.partial" / "kept" / "command.json"
    record.parent.mkdir(parents=True)
    record.write_text(text)
    result = CliRunner().invoke(cli, ["merge", str(tmp_path / "out.safetensors")])
    assert result.exit_code == 1 and "no shard of it was begun here" in result.output
    command = ["compress", str(model), "-o", str(tmp_path / "out.safetensors"), "--effort", "fast", "--shard", "1/1"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert set(json.loads(record.read_text())["options"]).isdisjoint({"trust_remote_code", "key_file"})


@pytest.mark.slow
def test_shards_that_begin_together(model: Path, tmp_path: Path) -> None:
    """As a scheduler starts them: one record, of the first."""
    output = str(tmp_path / "out.safetensors")
    command = [sys.executable, "-m", "seedpack", "compress", str(model), "-o", output, "--effort", "fast", "--shard"]
    begun = [subprocess.Popen([*command, f"{n}/3"], stderr=subprocess.PIPE, text=True) for n in (1, 2, 3)]
    ends = [process.communicate()[1] for process in begun]
    assert [process.returncode for process in begun] == [0, 0, 0], ends
    assert CliRunner().invoke(cli, ["merge", output]).exit_code == 0
