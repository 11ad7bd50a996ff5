"""The examples run, in short, as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MNIST = ROOT.parent / "shared" / "data" / "mnist"


def run(folder: Path, *command: str) -> str:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    program = [sys.executable, str(ROOT / "examples" / command[0]), *command[1:]]
    done = subprocess.run(
        program, cwd=folder, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason=f"no pictures at {MNIST}")
@pytest.mark.parametrize("name", ["pranc", "supermask"])
def test_pictures(name: str, tmp_path: Path) -> None:
    said = run(tmp_path, f"{name}.py", "--limit", "6000", "--epochs", "2", "--output", "net.safetensors")
    accuracy = float(said.split("accuracy loaded")[1].split("%")[0])
    assert accuracy > 70
    assert (tmp_path / "net.safetensors").stat().st_size < 12_000


@pytest.mark.slow
def test_language_model(tmp_path: Path) -> None:
    said = run(tmp_path, "language_model.py", "--steps", "5", "--count", "500")
    line = next(line for line in said.splitlines() if line.startswith("nats per byte"))
    before, after, loaded = map(float, re.findall(r"\d\.\d+", line))
    assert after < before and loaded == after


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason=f"no pictures at {MNIST}")
def test_mnist_study(tmp_path: Path) -> None:
    said = run(tmp_path, "mnist_study.py", "--limit", "3000", "--epochs", "2", "--output", "study")
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line.startswith(("baseline ", "L2 ", "L1 "))}
    assert len(rows) == 3 and all(float(row[2].rstrip("%")) > 75 for row in rows.values())
    bounds = [line.split() for line in said.splitlines() if re.match(r"\d+ +\d+ +0 ", line)]
    assert len(bounds) == 10 and all(float(row[3]) < float(row[4]) for row in bounds)
    assert all(name in said for name in ("trellis", "seedlm", "svd", "basis", "mask"))
