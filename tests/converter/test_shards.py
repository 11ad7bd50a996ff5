"""Shares of a model's tensors, fitted apart and merged."""

from __future__ import annotations

import json
import math
import os
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
from seedpack.errors import ModelError, OptionError, OutputError
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


def test_calibrated_by_one_for_all(tmp_path: Path) -> None:
    model, output = tmp_path / "dense", tmp_path / "out"
    llama().save_pretrained(model)
    ids = torch.arange(128).reshape(4, 32) % 64
    options = {**OPTIONS, "bits": 3.3, "calibration": Calibration(ids, context=32)}
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
