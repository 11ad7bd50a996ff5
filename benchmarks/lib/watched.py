"""A program run in a process of its own, with the most memory that it had."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

INTERVAL = 0.01  # seconds between two looks
BARE = "import torch, transformers, transformers.modeling_utils"


@dataclass(frozen=True)
class Watched:
    """The memory and time that a process took, and its output.

    Attributes:
        peak_bytes: the most resident memory that it had, pages of mapped files included (VmHWM).
        private_bytes: the most that was its own: pages of mapped files, which the kernel drops when it needs room, left out.
        seconds: from start to end.
        output: on standard output.
        errors: on standard error.
    """

    peak_bytes: int
    private_bytes: int
    seconds: float
    output: str
    errors: str


def watch(command: Sequence[object]) -> Watched:
    """Run a command of one process that must succeed.

    Raises:
        RuntimeError: it failed, with what it said.
    """
    peak = private = 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=errors)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            text = status.read_text()
            peak = max(peak, _field(text, "VmHWM"))
            private = max(private, _field(text, "RssAnon"))
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - started
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read())
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {process.returncode}\n{texts[0]}\n{texts[1]}")
    return Watched(peak, private, seconds, *texts)


def seedpack(*arguments: object) -> list[object]:
    """Return the command line of seedpack in this Python."""
    return [sys.executable, "-m", "seedpack", *arguments]


@cache
def bare() -> int:
    """Return the private memory of a process that has only imported torch and transformers."""
    return watch([sys.executable, "-c", f"{BARE}; import time; time.sleep(0.2)"]).private_bytes


def _field(status: str, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0
