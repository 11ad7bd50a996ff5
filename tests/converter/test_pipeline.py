"""Options, plans as public values, and the order of the converter's steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seedpack
from seedpack import Calibration, CompressOptions
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.sources.base import OpenModel
from seedpack.converter.sources.state_dict import StateDictSource
from seedpack.errors import KeyNeededError, ModelError
from tests.helpers.models import llama

FAST: dict[str, Any] = {"settings": {"effort": "fast"}}


def state() -> dict[str, Tensor]:
    return {"a.weight": torch.randn(32, 24), "b.weight": torch.randn(16, 32), "b.bias": torch.randn(16)}


def test_a_plan_is_made_edited_and_followed(tmp_path: Path) -> None:
    tensors = state()
    plan = seedpack.plan(tensors, bits=3.0, **FAST)
    assert [t.name for t in plan.tensors if t.packed] == ["a.weight", "b.weight"]
    raw = plan.edited({"seedpack_plan": 1, "tensors": {"b.weight": {"codec": "raw", "config": {"dtype": "F32"}}}})
    report = seedpack.compress(tensors, tmp_path / "edited", plan=raw)
    assert report.plan == raw and [t.plan.name for t in report.tensors] == ["a.weight"]
    seedpack.compress(tensors, tmp_path / "followed", plan=plan)
    seedpack.compress(tensors, tmp_path / "direct", bits=3.0, **FAST)
    assert (tmp_path / "followed").read_bytes() == (tmp_path / "direct").read_bytes()


def test_edits_win_over_options(tmp_path: Path) -> None:
    edits = {"seedpack_plan": 1, "tensors": {"b.weight": {"codec": "raw", "config": {"dtype": "F32"}}}}
    (tmp_path / "plan.json").write_text(json.dumps(edits))
    for given in (edits, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        plan = seedpack.plan(state(), CompressOptions(bits=2.0), edits=given)
        assert [t.name for t in plan.tensors if t.packed] == ["a.weight"]
        report = seedpack.compress(state(), tmp_path / "out", CompressOptions(bits=2.0, force=True), plan=given)
        assert report.plan == plan


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    plan = seedpack.plan(state())
    for other in ({**state(), "a.weight": torch.randn(8, 24)}, {"c.weight": torch.randn(8, 8), **state()}):
        with pytest.raises(
            ModelError, match=r"the plan is for another model: '(a|c).weight' is .* in the plan, .* in the model"
        ):
            seedpack.compress(other, tmp_path / "out", plan=plan)
    with pytest.raises(ModelError, match="bits is given, and a plan that has chosen it already"):
        seedpack.compress(state(), tmp_path / "out", plan=plan, bits=3.0)
    assert not list(tmp_path.iterdir())


def test_options_are_checked_when_they_are_made(tmp_path: Path) -> None:
    for changes, message in (
        ({"bit": 3}, "no such option: 'bit'; known: codec, bits, settings"),
        ({"bits": 3.0, "target_size": 900}, "give bits or a target size, not both"),
        ({"dtype": "int3"}, "dtype 'int3': choose float32, float16, bfloat16 or float64"),
        ({"shard_bytes": 1000}, "only a Hugging Face folder is split into shards"),
        ({"device": "tpu"}, "device 'tpu': fitting runs on cpu, cuda, or cuda:N"),
        ({"codec": TrellisCodec(), "key": bytes(16)}, "a private key is given, and a codec that is made already"),
        ({"importance": {"x": torch.ones(3)}}, "importance is given for 'x'; no such tensor in the model"),
    ):
        with pytest.raises(ModelError, match=message):
            seedpack.compress(state(), tmp_path / "out", **changes)
    options = CompressOptions(calibration="self", bits=3.0)
    assert options.calibrated == Calibration("self") and CompressOptions(calibration="none").calibrated is None
    assert CompressOptions.of(options, {"bits": 2.0}) == CompressOptions(calibration="self", bits=2.0)


def test_a_private_key_is_an_option(tmp_path: Path) -> None:
    key, weight = os.urandom(16), {"a.weight": torch.randn(32, 24)}
    options = CompressOptions(codec="basis", key=key)
    assert seedpack.plan(weight, options).totals()["bits_per_packed_weight"] == pytest.approx(4, abs=0.1)
    assert options.settings and options.settings["seed"] == CompressOptions.of(options, {}).settings["seed"]  # type: ignore[index]
    assert key.hex() not in repr(options) and str(key) not in repr(options)
    seedpack.compress(weight, tmp_path / "out", options)
    with pytest.raises(KeyNeededError, match="private key"):
        seedpack.load(tmp_path / "out", dense=True)
    assert seedpack.load(tmp_path / "out", dense=True, key=key)["a.weight"].shape == (32, 24)
    seedpack.unpack(tmp_path / "out", tmp_path / "dense", key=key)
    assert (tmp_path / "dense").exists()


def test_patterns_and_dtypes_as_they_come() -> None:
    plan = seedpack.plan(state(), exclude="b.*", dtype=torch.float16)
    assert [t.name for t in plan.tensors if t.packed] == ["a.weight"] and {t.dtype for t in plan.tensors} == {"F16"}
    with pytest.raises(ModelError, match="dtype 'torch.int8': choose float32"):
        seedpack.plan(state(), dtype=torch.int8)


def test_a_calibrated_plan_is_what_compress_follows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "dense")
    options = CompressOptions(bits=3.4, calibration=Calibration("self", 128, 32, measure=False), **FAST)
    with pytest.raises(ModelError, match="name the output that the plan is for"):
        seedpack.plan(tmp_path / "dense", options)
    plan = seedpack.plan(tmp_path / "dense", options, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert seedpack.compress(tmp_path / "dense", tmp_path / "out", options).plan == plan
    followed = seedpack.compress(
        tmp_path / "dense", tmp_path / "again", plan=plan, calibration=Calibration("self", 128, 32)
    )
    assert followed.plan == plan
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_a_plan_keeps_its_dtype(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "dense")
    plan = seedpack.plan(tmp_path / "dense", dtype="float16", **FAST)
    seedpack.compress(tmp_path / "dense", tmp_path / "out", plan=plan)
    seedpack.compress(tmp_path / "dense", tmp_path / "direct", dtype="float16", **FAST)
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes() for name in names)
    with pytest.raises(ModelError, match="dtype is given, and a plan that has chosen it already"):
        seedpack.compress(tmp_path / "dense", tmp_path / "again", plan=plan, dtype="bfloat16")


def test_a_plan_in_sequence_fits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "dense")
    options = CompressOptions(calibration=Calibration("self", 64, 32, sequential=True), **FAST)
    with monkeypatch.context() as patch:
        patch.setattr(TrellisCodec, "encode", None)
        plan = seedpack.plan(tmp_path / "dense", options, output=tmp_path / "out")
    assert seedpack.compress(tmp_path / "dense", tmp_path / "out", options).plan == plan


def test_modules_that_only_look_like_transformers_models(tmp_path: Path) -> None:
    class Lookalike(nn.Linear):
        def save_pretrained(self, path: Path) -> None: ...

        def generate(self) -> None: ...

    report = seedpack.compress(Lookalike(24, 32), tmp_path / "out", calibration=[torch.randn(64, 24)], **FAST)
    assert not report.plan.tensors[0].codec.circular  # type: ignore[attr-defined]


def test_progress_counts_every_weight_once(tmp_path: Path) -> None:
    done: list[tuple[str, int, int, str, str]] = []
    seedpack.compress(state(), tmp_path / "out", progress=lambda *told: done.append(told), **FAST)
    assert list(dict.fromkeys(entry[0] for entry in done)) == ["Reading the model", "Checking values", "Fitting"]
    for stage in ("Checking values", "Fitting"):
        told = [entry for entry in done if entry[0] == stage and entry[1]]
        assert {entry[3:] for entry in told} == {("weights", "a.weight"), ("weights", "b.weight")}
        assert sum(entry[1] for entry in told) == 32 * 24 + 16 * 32 == told[0][2]


def test_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seedpack.compress(state(), tmp_path / "out", progress=True, **FAST)
    shown = capsys.readouterr().err
    assert "Reading the model" in shown and "Fitting:" in shown and "weights/s" in shown
    seedpack.compress(state(), tmp_path / "again", **FAST)
    assert not capsys.readouterr().err


def test_a_source_of_ones_own(tmp_path: Path) -> None:
    class Mine(StateDictSource):
        def open_model(self) -> OpenModel:
            return OpenModel(nn.Linear(24, 32))

    source = Mine("mine", {"weight": torch.randn(32, 24), "bias": torch.randn(32)})
    report = seedpack.compress(source, tmp_path / "out", calibration=[torch.randn(64, 24)], **FAST)
    assert not report.plan.tensors[0].codec.circular  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="in sequence is for language models"):
        seedpack.compress(source, tmp_path / "b", calibration=Calibration([torch.randn(64, 24)], sequential=True))
