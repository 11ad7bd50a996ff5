"""Regenerate every number that the README and docs/ quote: the result pages, and then what is made from them.

An interrupted run of the same commit goes on with the page that it was at.
"""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.lib import models
from seedpack.converter.journal import write_file

MODULES = (
    "kernels.trellis",
    "kernels.multipliers",
    "kernels.feedback",
    "language.choices",
    "language.allocation",
    "kernels.seedlm",
    "kernels.svd",
    "converter.memory",
    "converter.estimates",
    "converter.resume",
    "converter.scale",
    "language.footprint",
    "language.damage",
    "language.fuzzing",
    "language.packed_weights",
    "language.first_minutes",
    "language.new_user",
    "language.table",
    "language.calibration",
    "language.peers",
    "language.texts",
    "language.sequence",
    "language.tuning",
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

RECORD = models.CACHE / "run_all.json"  # of the pages that are done

if __name__ == "__main__":
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=models.ROOT, capture_output=True, text=True
    ).stdout.strip()
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    if record.get("commit") != commit:
        record = {"commit": commit, "done": []}
    for module in MODULES:
        if module in record["done"]:
            print(f"== {module}: done before the interrupt", flush=True)
            continue
        print(f"== {module}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{module}", "--write"], check=True)
        record["done"].append(module)
        write_file(RECORD, lambda path: path.write_text(json.dumps(record)))
    RECORD.unlink()
    subprocess.run([sys.executable, "-m", "benchmarks.results"], check=True)
