"""Kernels in forked processes and in threads, each case in a process of its own (`tests/helpers/threads.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.marks import slow

ROOT = Path(__file__).resolve().parent.parent.parent


def outcome(case: str, layer: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "tests.helpers.threads", case]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.strip()


@pytest.mark.parametrize("layer", slow("omp", "workqueue"))
def test_a_forked_child_computes_the_same_on_one_thread(layer: str) -> None:
    """Torch is set to one thread too where kernels had started OpenMP's, which it shares."""
    assert outcome("fork", layer) == f"(True, 'SERIAL') 0 ((True, 1, 1), '(True, 1, 1) 0') 0 {[True] * 6}"


@pytest.mark.slow
def test_a_forked_child_does_without_torchs_threads() -> None:
    assert outcome("region", "omp") == "(True, True, 1) 0"


@pytest.mark.slow
def test_a_forked_child_encodes_the_same() -> None:
    assert outcome("encode", "omp") == "(True, 1) 0"


@pytest.mark.parametrize(("layer", "mode"), [("workqueue", "IN_TURN"), *slow(("omp", "TOGETHER"))])
def test_threads_call_at_once(layer: str, mode: str) -> None:
    """Numba's workqueue ends a process in which two threads do so; calls wait for each other there and nowhere else."""
    assert outcome("threads", layer) == f"True 200 {layer} {mode}"
