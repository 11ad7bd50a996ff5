"""Fuzz with atheris, which learns from the code that each input reaches: `make fuzz`, or

    python -m tests.fuzz                               every target, and a table
    python -m tests.fuzz header --runs 1000000         one
    python -m tests.fuzz --keep build/corpus           inputs that reached new code, to be looked through

An input that ends in a foreign error, or takes more than a second, is written to `findings/TARGET` and the run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
SECONDS, MEGABYTES = 1.0, 512  # that an input may take, beyond the process that has run the corpus
COLUMNS = ("target", "executions", "per second", "longest, s", "memory, MB", "findings")
COMPILED = ["seedpack.kernels", "seedpack.prng"]  # by numba, which takes no other bytecode


class Run:
    """One target in this process.

    Args:
        target: its name.
        runs: inputs after which it ends.
        run: what takes a target's name and an input.
    """

    def __init__(self, target: str, runs: int, run: Any):
        self.target, self.runs, self._run = target, runs, run
        self.done, self.longest, self.findings = 0, 0.0, dict[str, str]()
        for path in sorted((CORPUS / target).glob("*")):
            run(target, path.read_bytes())  # kernels are compiled
        self._started, self._memory = time.perf_counter(), _peak_megabytes()

    def one(self, data: bytes) -> None:
        """Run an input, and end the process after the last one."""
        started = time.process_time()  # which other processes do not lengthen
        try:
            self._run(self.target, data)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._found(f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}", data)
        took = time.process_time() - started
        if took > SECONDS:
            self._found(f"{took:.1f} s", data)
        self.longest = max(self.longest, took)
        self.done += 1
        if self.done == self.runs:
            self.end()

    def _found(self, what: str, data: bytes) -> None:
        if what not in self.findings and len(self.findings) < 20:
            path = Path("findings") / self.target / hashlib.sha256(data).hexdigest()[:16]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self.findings[what] = str(path)
            print(f"{self.target}: {what}: {path}", file=sys.stderr, flush=True)

    def end(self) -> NoReturn:
        """Print what was found, and end the process, which libFuzzer would end without a word."""
        seconds, memory = time.perf_counter() - self._started, _peak_megabytes() - self._memory
        if memory > MEGABYTES:
            self.findings[f"{memory:.0f} MB"] = ""
        row = [self.target, self.done, self.done / seconds, self.longest, memory, self.findings]
        print(json.dumps(row), flush=True)
        os._exit(0)


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(target: str, runs: int, keep: Path) -> NoReturn:
    """Run a target in this process."""
    import atheris

    with atheris.instrument_imports(include=["seedpack", "tests.fuzz"], exclude=COMPILED):
        from tests.fuzz.targets import run

    keep.mkdir(parents=True, exist_ok=True)
    one = Run(target, runs, run)
    options = ["-timeout=60", "-rss_limit_mb=4096", "-verbosity=0", "-max_len=4096", "-print_final_stats=0"]
    atheris.Setup([sys.argv[0], *options, str(keep), str(CORPUS / target)], one.one)
    atheris.Fuzz()
    one.end()


def rows(targets: list[str], runs: int, keep: Path) -> list[list[Any]]:
    """Run targets one after the other, each in a process of its own, and return their figures."""
    found = []
    for target in targets:
        command = [sys.executable, "-m", "tests.fuzz", target, "--runs", str(runs), "--keep", str(keep), "--here"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = done.stdout.splitlines()
        found.append(json.loads(lines[-1]) if lines else [target, 0, 0.0, 0.0, 0.0, {"ended": str(done.returncode)}])
    return found


def cells(row: list[Any]) -> list[str]:
    """Return a row as a table shows it."""
    target, done, rate, longest, memory, findings = row
    return [target, f"{done:,}", f"{rate:,.0f}", f"{longest:.2f}", f"{memory:.0f}", str(len(findings))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz what reads files.")
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for each target")
    parser.add_argument("--keep", type=Path, default=None, help="folder of inputs that reached new code")
    parser.add_argument("--here", action="store_true", help="run the one target in this process, and print JSON")
    arguments = parser.parse_args()
    keep = arguments.keep or Path(tempfile.mkdtemp())
    targets = arguments.targets or sorted(path.name for path in CORPUS.iterdir())
    if arguments.here:
        fuzz(targets[0], arguments.runs, keep / targets[0])
    found = rows(targets, arguments.runs, keep)
    for line in ([*COLUMNS], *map(cells, found)):
        print("".join(cell.rjust(14) if i else cell.ljust(16) for i, cell in enumerate(line)))
    sys.exit(any(row[-1] for row in found))


if __name__ == "__main__":
    main()
