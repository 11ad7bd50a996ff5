"""Millions of hostile inputs for what reads files, by the targets of `tests/fuzz`; needs atheris (`pip install atheris`)."""

from __future__ import annotations

import importlib.metadata
import tempfile
from pathlib import Path

from benchmarks.lib import report
from tests.fuzz import __main__ as fuzzing

# Inputs by what one costs: half a minute or some for each target, and minutes for the two that are fastest.
RUNS = {
    "header-text": 6_000_000,
    "manifest-text": 4_200_000,
    "header": 150_000,
    "manifest": 60_000,
    "file": 60_000,
    "checkpoint": 4_000,
    "folder": 4_000,
    "plan": 60_000,
    "config": 50_000,
    "journal": 30_000,
    "coder": 4_000,
    "codec-basis": 40_000,
    "codec-field": 1_500,
    "codec-mask": 40_000,
    "codec-raw": 40_000,
    "codec-seedlm": 30_000,
    "codec-stack": 20_000,
    "codec-svd": 40_000,
    "codec-trellis": 40_000,
}


def introduce(result: report.Result) -> None:
    """Say what is run and what counts."""
    result.say(
        f"Inputs that atheris {importlib.metadata.version('atheris')} makes, guided by the Python code that they reach, from the "
        "corpus in `tests/fuzz/corpus` on. The first targets take the text or the file itself. The others take a program of "
        "changes to a sound file, whose digests are made right again, so that what lies behind them is reached."
    )
    result.say(
        f"A finding is an exception that is none of seedpack's own, more than {fuzzing.SECONDS:g} s of CPU time for an input, or more than "
        f"{fuzzing.MEGABYTES} MB beyond the process that has run the corpus. Decoding may take 20 MB here (`max_bytes`)."
    )


def measure(result: report.Result) -> None:
    introduce(result)
    keep = Path(tempfile.mkdtemp())
    rows = []
    for target, runs in RUNS.items():
        rows += fuzzing.rows([target], runs, keep)
        print(fuzzing.cells(rows[-1]), flush=True)
    result.table(fuzzing.COLUMNS, [fuzzing.cells(row) for row in rows])
    total = sum(row[1] for row in rows)
    result.say(f"In all {total:,} executions, {sum(len(row[-1]) for row in rows)} findings.")


if __name__ == "__main__":
    report.run("fuzzing", "Fuzzing", measure)
