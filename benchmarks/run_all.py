"""Regenerate every number that the README and docs/benchmarks quote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

for name in (
    "trellis",
    "multipliers",
    "choices",
    "seedlm",
    "svd",
    "footprint",
    "language",
    "calibration",
    "ingredients",
    "sentences",
    "images",
    "kodak",
    "kernels",
    "noise_layers",
    "pranc",
    "masks",
    "pranc_resnet",
    "fast_feedforward",
):
    print(f"== {name}", flush=True)
    subprocess.run([sys.executable, str(Path(__file__).parent / f"{name}.py"), "--write"], check=True)
