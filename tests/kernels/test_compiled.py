"""Every Triton kernel compiles for real GPUs without one; registers, spills and instructions are held to budgets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.marks import slow_but

ROOT = Path(__file__).resolve().parent.parent.parent
TARGETS = [("cuda", "80"), ("cuda", "89"), ("cuda", "90"), ("cuda", "100"), ("hip", "gfx942")]
# Instructions of the inner loop for each weight on sm_90, all counted: loads, addresses, the loop itself.
BUDGETS = {
    "trellis-1x4 1 tokens int8": 5.0,
    "trellis-1x3 1 tokens int8": 5.5,
    "trellis-1x2 1 tokens int8": 5.0,
    "trellis-2x3 1 tokens int8": 3.1,
    "trellis-2x2 1 tokens int8": 2.8,
    "trellis-1x4 1 tokens": 7.0,
    "trellis-1x3 1 tokens": 7.5,
    "trellis-1x2 1 tokens": 7.0,
    "trellis-2x3 1 tokens": 5.9,
    "trellis-2x2 1 tokens": 5.5,
}
THREADS = 32
SHARED_BYTES = {
    "cuda": 99 << 10,
    "hip": 64 << 10,
}  # what a program may have on sm_89, which has the least, and on gfx942


@cache
def compiled(backend: str, arch: str, only: str = "") -> dict[str, dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers.compiled", backend, arch, only]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


def per_weight(found: dict[str, Any]) -> float:
    """Of a kernel for few tokens: instructions of its loop over the weights that a thread takes in one round."""
    constants = found["constants"]
    weights = constants["BLOCK_N"] * constants["BLOCK_G"] * constants["PER"] * constants["WEIGHTS"]
    return found["loop"] * THREADS * found["num_warps"] / weights  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "arch"), TARGETS, ids=lambda value: value)
def test_every_kernel_compiles_without_spills(backend: str, arch: str) -> None:
    found = compiled(backend, arch)
    assert len(found) > 40
    extreme = "seedlm search 256x16"  # of a rank and a block that nobody should want
    assert {name: kernel["spills"] for name, kernel in found.items() if kernel["spills"] and name != extreme} == {}
    assert {name: kernel["shared"] for name, kernel in found.items() if kernel["shared"] > SHARED_BYTES[backend]} == {}


@pytest.mark.parametrize("name", slow_but(["trellis-1x4 1 tokens int8", "trellis-2x2 1 tokens int8"], BUDGETS))
def test_instructions_a_weight(name: str) -> None:
    assert 1.5 < per_weight(compiled("cuda", "90", name)[name]) <= BUDGETS[name]


@pytest.mark.slow
@pytest.mark.parametrize("survivors", [9, 12])
def test_instructions_an_edge(survivors: int) -> None:
    """Of the trellis's search, in the loop over predecessors: an addition, a dp4a, a multiply–add and a minimum."""
    assert 3 < compiled("cuda", "90")[f"search 1x4 of 16 keeping {survivors}"]["an_edge"] <= 4


@pytest.mark.slow
def test_instructions_a_seed() -> None:
    """Of SeedLM's bound, for each seed and block: P multiply–adds and a maximum; products, loads and the loop on top."""
    found = compiled("cuda", "90")["seedlm search 8x3"]
    pairs = found["constants"]["BLOCK_S"] * found["constants"]["BLOCK_B"]
    assert 4 < found["loop"] * THREADS * found["num_warps"] / pairs <= 6.5
