"""Compare what a run says beforehand with what it then takes."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.lib import large, models, report, watched
from benchmarks.lib.models import CACHE
from seedpack.units import duration, size

RUN = """
import json, sys, time
import seedpack
from seedpack.converter.estimate import estimate
from seedpack.converter.options import CompressOptions
from seedpack.converter.planning import make_plan
from seedpack.converter.sources.open import open_source

if __name__ == "__main__":
    model, output, changes = json.loads(sys.argv[1])
    if "calibration" in changes:
        changes["calibration"] = seedpack.Calibration("self", 2048, 128)
    options, first = CompressOptions.of(None, changes), []
    source = open_source(model)
    started = time.perf_counter()
    found = estimate(source, make_plan(source, options), options)
    estimating = time.perf_counter() - started

    def progress(stage, done, total, unit="", text=""):
        if stage == ("Fitting" if options.calibrated else "Checking values") and not first:
            first.append(time.perf_counter())

    written = seedpack.compress(source, output, options, progress=progress)
    took = time.perf_counter() - first[0]
    print(json.dumps([estimating, found.seconds, found.memory_bytes, found.output_bytes, took, written.file_bytes]))
"""
FAST = {"settings": {"effort": "fast"}}
SOME = {"include": ["*layers.1[0-4].*"]}  # of the 30 layers of SmolLM2: codecs that take long


def kinds(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return models with options, by label."""
    dense, gguf = models.smollm2(), models.smollm2_gguf()
    wide = large.write_folder(folder / "wide", large.llama_config(2048, 5632, 2, 16000))
    return {
        "SmolLM2, float32 folder, 4 bits, fast": (dense, FAST),
        "SmolLM2, float32 folder, 2 bits, fast": (dense, {"bits": 2, **FAST}),
        "SmolLM2, float32 folder, 4 bits, fast, 2 jobs": (dense, {"jobs": 2, **FAST}),
        "SmolLM2, GGUF, 4 bits, fast": (gguf, FAST),
        "5 layers of SmolLM2, 4 bits, default": (dense, SOME),
        "5 layers of SmolLM2, seedlm": (dense, {"codec": "seedlm", **SOME}),
        "5 layers of SmolLM2, svd": (dense, {"codec": "svd", **SOME}),
        "5 layers of SmolLM2, 3 bits, fast, calibrated": (dense, {"bits": 3, "calibration": "self", **FAST, **SOME}),
        "wide Llama, bfloat16 folder, 4 bits, fast": (wide, FAST),
    }


def share(said: float | None, took: float) -> str:
    """Return by how much what was said differs from what was taken."""
    return "" if said is None else f"{100 * (said / took - 1):+.0f}%"


def run(place: Path, model: Path, changes: dict[str, Any]) -> list[str]:
    """Run, and return what was said and what it took, as the cells of a row."""
    script, output = place / "run.py", place / "packed"  # a file: workers import it
    script.write_text(RUN)
    found = watched.watch([sys.executable, script, json.dumps([str(model), str(output), changes])])
    shutil.rmtree(output)
    estimating, seconds, memory, said_bytes, took, file_bytes = json.loads(found.output.splitlines()[-1])
    alone = changes.get("jobs", 1) == 1 and "calibration" not in changes
    return [
        f"{estimating:.1f}", "" if seconds is None else duration(seconds), duration(took), share(seconds, took),
        size(memory), size(found.peak_bytes) if alone else "", share(memory, found.peak_bytes) if alone else "",
        size(said_bytes), "exact" if said_bytes == file_bytes else f"{file_bytes - said_bytes:+} bytes",
    ]  # fmt: skip


def measure(result: report.Result) -> None:
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        for label, (model, changes) in kinds(Path(place)).items():
            if not result.wanted(label):
                continue
            row = report.kept("estimates", label, lambda m=model, c=changes: {"cells": run(Path(place), m, c)})  # type: ignore[misc]
            rows.append((label, *row["cells"]))
    result.say(
        "What `seedpack compress` says before it begins, beside what the run took. Rows of two tensors of the model are fitted "
        "first; seconds of that are in the first column. Memory is all that is resident (VmHWM), of one process."
    )
    result.say(
        "A time is that of checking, fitting and writing; with a calibration that of fitting and writing, because neither the time "
        "nor the memory of calibrating is told beforehand. svd's time is not told."
    )
    result.table(
        ("run", "s to estimate", "time: said", "took", "", "memory: said", "took", "", "output: said", "took"), rows
    )


if __name__ == "__main__":
    report.run("estimates", "Estimates beside runs", measure)
