"""One case: a tiny model is built, saved, packed, loaded and compared with its own dense rebuild."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

import seedpack
from benchmarks.language.architectures.cases import Case
from benchmarks.language.architectures.checks import Checks
from benchmarks.language.architectures.inputs import Candidate, cloned, tower_inputs, working_inputs
from benchmarks.language.architectures.listening import listening
from benchmarks.language.architectures.models import CannotBuildError, build, described
from benchmarks.language.architectures.outputs import difference
from benchmarks.language.architectures.problems import FailedError, Problems, attempt
from benchmarks.language.architectures.time_limit import TimedOut, time_limit
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.converter.plan import Plan
from seedpack.converter.report import Report
from seedpack.dtypes import PACKABLE

MANY_WEIGHTS = 700_000  # above, a codec that takes less time
FOLDERS = ("dense", "packed", "decoded", "again")  # that a case makes


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Return a record of a case; its "status" is one of these.

    - ok: everything agrees.
    - weights: no input was found that the model takes, and its tensors agree.
    - fail: "problems" says what does not agree, or what raised.
    - skip: transformers itself cannot build, save or load it here; "why" says so.
    """
    record: dict[str, Any] = {"task": case.task, "problems": []}
    try:
        with time_limit(40):
            model, record["variant"] = build(case)
        inputs, errors = working_inputs(model)
        towers = tower_inputs(model)
    except CannotBuildError as error:
        return record | {"status": "skip", "why": list(error.args)}
    except (Exception, TimedOut) as error:
        return record | {"status": "skip", "why": [described(error)]}
    record["weights"] = sum(parameter.numel() for parameter in model.parameters())
    record["towers"] = [f"{name}({label})" for name, label, _ in towers]
    if not inputs:
        record["no_inputs"] = errors[:4]
    try:
        trip = RoundTrip(case, model, inputs, folder / "dense", record)
    except Exception as error:
        return record | {"status": "skip", "why": [f"transformers cannot save and load it: {described(error)}"]}
    record["inputs"] = [label for label, _ in trip.inputs]
    problems = Problems(record["problems"])
    try:
        pack(folder, record)
        packed, told = load_packed(case, folder / "packed", record)
        trip.compare_loading(*told, record, problems)
        checks = Checks(case, packed, folder, record, problems)
        checks.forward(trip.inputs, towers)
        checks.generation(trip.inputs)
        checks.saved_again()
        checks.dequantised(trip.altered)
        checks.loaded_by_seedpack()
    except FailedError as failed:
        problems.add(failed.kind, failed.text, failed.place)
    record["status"] = "fail" if problems.found else "ok" if record.get("differences") else "weights"
    return record


class RoundTrip:
    """Does transformers save and load a model itself? What it changes or warns of thereby is none of seedpack's.

    Attributes:
        inputs: those that the loaded model takes.
        altered: names of tensors whose values change.
    """

    def __init__(self, case: Case, model: Any, inputs: list[Candidate], folder: Path, record: dict[str, Any]):
        self._class, self._folder = case.model_class, folder
        model.save_pretrained(folder)
        (loaded, self._info), self._warnings = listening(lambda: self._load(output_loading_info=True))
        if missing := sorted(self._info["missing_keys"]):
            raise ValueError(f"{len(missing)} of its own tensors are not loaded back: {missing[:3]}")
        before, after = model.state_dict(), loaded.state_dict()
        self.altered = {
            name
            for name in before.keys() & after.keys()
            if before[name].shape == after[name].shape and not torch.equal(before[name], after[name])
        }
        self.inputs = self._usable(model, inputs, record)

    def _load(self, **options: Any) -> Any:
        return self._class.from_pretrained(self._folder, dtype=torch.float32, **options)

    @torch.no_grad()
    def _usable(self, model: Any, inputs: list[Candidate], record: dict[str, Any]) -> list[Candidate]:
        """Return the inputs that a model takes that has seen no others."""
        usable: list[Candidate] = []
        for label, values in inputs:
            try:
                output = self._load().eval()(**cloned(values))
            except Exception:
                record.setdefault("dropped", []).append(label)
                continue
            usable.append((label, values))
            if len(usable) > 1:
                continue
            try:
                distance, place = difference(output, model(**cloned(values)))
            except Exception:  # the trials of inputs have changed the first model
                continue
            if distance > 1e-4:
                record["transformers"] = f"saved and loaded again it differs by {distance:.2g} at {place}"
        return usable

    def compare_loading(
        self, info: dict[str, Any], warnings: list[str], record: dict[str, Any], problems: Problems
    ) -> None:
        """Compare what is told on loading the packed model with what is on loading the dense one."""
        for key, names in info.items():
            known = set(map(str, self._info.get(key, ())))
            if extra := sorted(set(map(str, names)) - known):
                problems.add("loading info", f"{key}: {len(extra)}: {extra[:5]}")
        if new := [line for line in warnings if line not in self._warnings]:
            record["warnings"] = new[:5]


def pack(folder: Path, record: dict[str, Any]) -> None:
    """Pack the dense folder, and record what stays raw and the sizes."""
    many = record["weights"] > MANY_WEIGHTS
    options: dict[str, Any] = {"bits": 4.0, "settings": {"effort": "fast"}}
    if many:
        options = {"codec": SeedLMCodec(9, 8, 3, 1)}
    started = time.monotonic()
    report: Report = attempt("compress", lambda: seedpack.compress(folder / "dense", folder / "packed", **options))
    totals = report.plan.totals()
    record |= {
        "codec": "seedlm" if many else "trellis",
        "compress_seconds": round(time.monotonic() - started, 1),
        "raw_shares": report.plan.raw_shares(),
        "raw": left_raw(report.plan),
        "bits_per_packed_weight": totals["bits_per_packed_weight"],
        "bits_per_weight": totals["bits_per_weight"],
        "bits_per_weight_of_file": 8 * report.file_bytes / max(1.0, totals["weights"]),
    }


def left_raw(plan: Plan) -> list[dict[str, Any]]:
    """Return the largest tensors of two axes or more that stay raw, each with the plan's note."""
    raw = [t for t in plan.tensors if not t.packed and len(t.shape) > 1 and t.dtype in PACKABLE]
    raw.sort(key=lambda tensor: -tensor.stored_bytes)
    return [{"name": t.name, "shape": list(t.shape), "note": t.note, "bytes": t.stored_bytes} for t in raw[:60]]


def load_packed(case: Case, folder: Path, record: dict[str, Any]) -> tuple[Any, tuple[dict[str, Any], list[str]]]:
    """Return the packed model, by its auto class if that can be, and transformers' loading info and warnings."""

    def load(cls: Any) -> tuple[Any, dict[str, Any], list[str]]:
        work = lambda: cls.from_pretrained(folder, output_loading_info=True)  # noqa: E731
        (model, info), warnings = attempt("load", lambda: listening(work))
        return model.eval(), info, warnings

    try:
        model, info, warnings = load(case.auto_class)
        if type(model).__name__ != case.model_class.__name__:
            record["auto"] = f"{case.auto_class.__name__} gives {type(model).__name__}"
    except FailedError as failed:
        if case.auto_class is case.model_class:
            raise
        record["auto"] = f"{case.auto_class.__name__}: {failed.text[:160]}"
    if "auto" in record:
        model, info, warnings = load(case.model_class)
    return model, (info, warnings)
