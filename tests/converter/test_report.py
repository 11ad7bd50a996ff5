"""A run tells what it will take, and afterwards what it made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import seedpack
from seedpack import Calibration
from seedpack.codecs.importance import Importance
from seedpack.converter import estimate as estimates
from seedpack.converter.estimate import bytes_to_fit, estimate
from seedpack.converter.options import CompressOptions
from seedpack.converter.planning import make_plan
from seedpack.converter.sources.open import open_source
from seedpack.units import count, duration, size
from tests.helpers.models import llama


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a.weight": torch.randn(96, 128), "b.weight": torch.randn(64, 256), "b.bias": torch.randn(64)}


def test_the_report_in_words(tmp_path: Path) -> None:
    report = seedpack.compress(state(), tmp_path / "out", bits=3)
    lines = report.summary()
    dense, written = 4 * (96 * 128 + 64 * 256 + 64), (tmp_path / "out").stat().st_size
    assert lines["size"] == f"{size(dense)} → {size(written)} ({dense / written:.2f}× smaller)"
    assert "3.000" not in lines["bits per weight"] and "over all (2 of 3 tensors packed)" in lines["bits per weight"]
    assert lines["left raw"] == "0.2% of the weights (no matrix 0.2%)"
    error = sum(t.error for t in report.tensors) / sum(t.energy for t in report.tensors)
    assert lines["error"].startswith(f"{100 * error:.2g}% of the weights' energy, usual for 3.")
    text = str(report)
    assert text.splitlines()[0] == f"Packed {tmp_path / 'out'}" and len(text.splitlines()) < 11 and repr(report) == text
    assert report._repr_html_().startswith("<table><caption>Packed") and "<td>size</td>" in report._repr_html_()


def test_errors_that_bits_do_not_explain(tmp_path: Path) -> None:
    report = seedpack.compress({"a.weight": state()["a.weight"]}, tmp_path / "out", bits=2)
    worse = replace(report, tensors=(replace(report.tensors[0], error=2 * report.tensors[0].error),))
    assert "usual for 2." in report.summary()["error"] and "more than usual for 2." in worse.summary()["error"]
    exact = seedpack.compress({"a.weight": torch.zeros(64, 64)}, tmp_path / "zero", bits=2)
    assert exact.summary()["error"].startswith("none of the weights' energy")


def test_sizes_are_those_of_what_was_given(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save({**state(), "step": 3}, path)
    report = seedpack.compress(path, tmp_path / "out", bits=3)
    assert report.input_bytes == path.stat().st_size and report.summary()["size"].startswith(size(path.stat().st_size))
    few = seedpack.compress({"a.weight": torch.randint(9, (64, 64)), "b.weight": torch.randn(64, 64)}, tmp_path / "x")
    assert "smaller" in few.summary()["size"]


def test_errors_of_outputs(tmp_path: Path) -> None:
    weights, x = state()["a.weight"], torch.randn(500, 128) * torch.linspace(0.1, 3, 128)
    hessian = x.T @ x / len(x)
    options = {"bits": 3.0, "settings": {"effort": "fast"}}
    report = seedpack.compress({"a.weight": weights}, tmp_path / "out", importance={"a.weight": hessian}, **options)  # type: ignore[arg-type]
    error = weights - seedpack.load(tmp_path / "out", dense=True)["a.weight"]
    (tensor,) = report.tensors
    assert tensor.output_error == pytest.approx(float((error @ hessian * error).sum()), rel=1e-4)
    assert tensor.output_energy == pytest.approx(float((weights @ hessian * weights).sum()), rel=1e-4)
    assert "which the fit minimises" in report.summary()["output error"]
    assert report.output_error_db == report.to_json()["output_error_db"] < report.error_db
    plain = seedpack.compress({"a.weight": weights}, tmp_path / "plain", **options)  # type: ignore[arg-type]
    assert plain.output_error_db is None and Importance(hessian).has_hessian


def test_the_head_and_the_calibration_are_named(tmp_path: Path) -> None:
    llama(tie_word_embeddings=False).save_pretrained(tmp_path / "dense")
    ids = torch.arange(64).reshape(2, 32) % 96
    calibration = seedpack.Calibration(ids, context=32, sequential=False)
    report = seedpack.compress(tmp_path / "dense", tmp_path / "out", bits=3, calibration=calibration)
    lines = report.summary()
    assert "the output head 4 bits" in lines["bits per weight"]
    assert lines["calibration"].startswith(f"{tmp_path / 'seedpack-calibration'} (")


def test_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(state())
    plan = seedpack.plan(source, bits=3, settings={"effort": "fast"})
    found = estimate(source, plan, CompressOptions())
    assert found.seconds is not None and 0 < found.seconds < 30 and found.memory_bytes > 10**8
    assert "of fitting" in str(found) and "of memory" in str(found) and "of disk until it stands" in str(found)
    packed = [tensor for tensor in plan.tensors if tensor.packed]
    assert bytes_to_fit(packed[0]) == 4 * 96 * 128 + 2 * packed[0].stored_bytes
    rank = seedpack.plan(source, codec="svd")
    without = estimate(source, rank, CompressOptions(codec="svd"))
    assert without.seconds is None and "how long its codec takes" in str(without)
    monkeypatch.setattr(estimates, "_sample", lambda source, tensors, codec, columns: (torch.zeros(999, columns), 0.0))
    monkeypatch.setattr(estimates, "_sampled", lambda codec, rows, options: 1.0)
    monkeypatch.setattr(estimates, "WARM_SECONDS", 0.0)
    assert estimate(source, plan, CompressOptions()).seconds == pytest.approx(96 / 32 + 64 / 16)
    monkeypatch.setattr(estimates, "_sampled", lambda codec, rows, options: (5 + len(rows)) / 1000)
    calibrated = estimate(source, plan, CompressOptions(calibration="self"))
    assert calibrated.seconds == pytest.approx((5 + 96 + 5 + 64) / 1000) and "after the calibration" in str(calibrated)
    budget = estimate(
        source, plan, CompressOptions(bits=3.5, calibration="self")
    )  # two plans are tried, and one is followed
    assert budget.seconds == pytest.approx(3 * (5 + 96 + 5 + 64) / 1000)
    unmeasured = estimate(source, plan, CompressOptions(bits=3.5, calibration=Calibration("self", measure=False)))
    assert unmeasured.seconds == calibrated.seconds
    jobs = estimate(source, plan, CompressOptions(jobs=2))
    assert jobs.seconds == pytest.approx((96 / 32 + 64 / 16) * (37 / 64) / 2 + estimates.START_SECONDS, rel=0.5)
    assert jobs.memory_bytes > 2 * found.memory_bytes


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "bfloat16"}, {"codec": "raw"}, {"codec": "svd"}, {"codec": "seedlm"}]
)
def test_the_size_is_exact(changes: dict[str, Any], tmp_path: Path) -> None:
    options = CompressOptions.of(None, changes)
    source = open_source(state())
    found = estimate(source, seedpack.plan(source, options), options)
    seedpack.compress(state(), tmp_path / "out.safetensors", options)
    assert found.output_bytes == (tmp_path / "out.safetensors").stat().st_size


@pytest.mark.parametrize("changes", [{"shard_bytes": 9000}, {"calibration": Calibration("self", 256, 32)}])
def test_the_size_of_a_folder_is_exact(changes: dict[str, Any], tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    options = CompressOptions.of(None, {"settings": {"effort": "fast"}, **changes})
    source = open_source(tmp_path / "dense")
    found = estimate(source, make_plan(source, options), options)
    report = seedpack.compress(tmp_path / "dense", tmp_path / "out", options)
    assert found.output_bytes == report.file_bytes
    assert report.file_bytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))


def test_numbers() -> None:
    assert (count(1, "file"), count(0, "file"), duration(86_400), size(999)) == ("1 file", "0 files", "1d00h", "999 B")
