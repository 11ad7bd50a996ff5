"""Regenerate every number that the README and docs/ quote: the result pages, and then what is made from them."""

from __future__ import annotations

import subprocess
import sys

MODULES = (
    "kernels.trellis",
    "kernels.multipliers",
    "language.choices",
    "kernels.seedlm",
    "kernels.svd",
    "converter.memory",
    "converter.estimates",
    "language.footprint",
    "language.damage",
    "language.packed_weights",
    "language.first_minutes",
    "language.table",
    "language.calibration",
    "language.ingredients",
    "language.sentences",
    "language.architectures",
    "images.resnets",
    "images.kodak",
    "kernels.products",
    "training.noise_layers",
    "training.pranc",
    "training.masks",
    "training.pranc_resnet",
    "training.fast_feedforward",
)

if __name__ == "__main__":
    for module in MODULES:
        print(f"== {module}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{module}", "--write"], check=True)
    subprocess.run([sys.executable, "-m", "benchmarks.results"], check=True)
