"""A result: printed as it is made, and with --write kept as docs/benchmarks/NAME.md, and rows in NAME.json beside it."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from benchmarks.lib import models

Way = TypeVar("Way")  # how a row is measured
FOLDER = models.ROOT / "docs" / "benchmarks"


class Result:
    """Lines of Markdown."""

    def __init__(self, name: str, title: str, command: str, only: str = "*", keep: bool = False):
        self.name, self.only, self._keep = name, only, keep
        self.lines = [f"# {title}", ""]
        self.say(
            f"Measured {datetime.date.today().isoformat()} on {models.machine()}, {models.versions()}. "
            f"Again: `{command}`."
        )

    def wanted(self, method: str) -> bool:
        """Tell whether --only asks for a method, where a benchmark has many."""
        return any(fnmatch.fnmatch(method, pattern) for pattern in self.only.split("|"))

    def rows_of(self, ways: Mapping[str, Way], measure: Callable[[Way], dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Measure the ways that are asked for, by label; return them and those that are known, in their order."""
        rows = [
            kept(self.name, label, functools.partial(measure, way)) for label, way in ways.items() if self.wanted(label)
        ]
        known = {row["label"]: row for row in self.joined(rows)}
        return {label: known[label] for label in ways if label in known}

    def say(self, text: str) -> None:
        self.lines += [text, ""]
        print(f"\n{text}", flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        cells = [[str(cell) for cell in row] for row in (columns, *rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in cells
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        self.lines += [*lines, ""]
        print("\n" + "\n".join(lines), flush=True)

    def joined(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows that were measured now, and those of other labels that were kept before, each with its date."""
        file = FOLDER / f"{self.name}.json"
        known = json.loads(file.read_text()) if file.is_file() else []
        by_label = {row["label"]: row for row in [*known, *rows]}
        if self._keep:
            FOLDER.mkdir(parents=True, exist_ok=True)
            file.write_text("[\n" + ",\n".join(json.dumps(by_label[label]) for label in sorted(by_label)) + "\n]\n")
        return list(by_label.values())

    def keep(self) -> None:
        """Write what there is so far, where it is asked for: a stage that fails later loses nothing."""
        if self._keep:
            self.write()

    def write(self) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{self.name}.md").write_text("\n".join(self.lines).rstrip() + "\n")


def kept(name: str, label: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One method's figures with their date; kept in the cache, so that an interrupted run goes on where it was."""
    file = models.CACHE / f"{name}-rows" / f"{re.sub('[^-+.,%A-Za-z0-9_]', '-', label)}.json"
    if file.is_file() and (known := json.loads(file.read_text()))["versions"] == models.versions():
        return known["row"]  # type: ignore[no-any-return]
    row = {"label": label, "measured": datetime.date.today().isoformat(), **measure()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"versions": models.versions(), "row": row}))
    print(", ".join([label, *(f"{key} {value:.4g}" for key, value in row.items() if type(value) is float)]), flush=True)
    return row


def added_memory(ready: str, code: str) -> float:
    """MB by which some code raises the memory of a process that has run what makes it ready; on Linux, which can forget an
    earlier peak."""
    program = (
        "import ctypes, re, pathlib\n"
        f"{ready}\nctypes.CDLL(None).malloc_trim(0)\npathlib.Path('/proc/self/clear_refs').write_text('5')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
        f"before = peak()\n{code}\nprint((peak() - before) * 1024 / 1e6)"
    )
    return float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def run(name: str, title: str, measure: Callable[[Result], None]) -> None:
    """Measure, print, and write the result where asked to."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--write", action="store_true", help=f"write docs/benchmarks/{name}.md")
    parser.add_argument("--only", default="*", help="methods to measure, patterns with | between them")
    arguments = parser.parse_args()
    spec = sys.modules["__main__"].__spec__
    module = name if spec is None else spec.name
    result = Result(name, title, f"python -m {module} --write", arguments.only, arguments.write)
    measure(result)
    if arguments.write:
        result.write()
        print(f"\nwritten: docs/benchmarks/{name}.md", file=sys.stderr)
