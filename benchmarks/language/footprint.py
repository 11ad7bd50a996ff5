"""Peak memory of compress, which must not grow with the number of layers, and of load; the time of seedpack --help."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import seedpack
from benchmarks.kernels.products import random_parts
from benchmarks.lib import models, report
from benchmarks.lib.models import CACHE
from seedpack.codecs.trellis import TrellisCodec

HIDDEN, INTERMEDIATE, VOCABULARY = 1024, 2816, 16384
SHAPE = {
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCABULARY, "num_attention_heads": 16,
    "num_key_value_heads": 4,
}  # fmt: skip

WATCH = """
import json, resource, sys, threading, time
page = resource.getpagesize()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * page
def watched(work):
    before, peak, done = resident(), 0, False
    def watch():
        nonlocal peak
        while not done:
            peak = max(peak, resident())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    result = work()
    done = True
    thread.join()
    return result, {"before": before, "peak": peak}
import seedpack, seedpack.api, torch, transformers
"""

COMPRESS = (
    WATCH
    + """
from seedpack.codecs.seedlm import SeedLMCodec
codec = SeedLMCodec(8, 8, 3)
codec.decode(codec.encode(torch.randn(64, 64)), (64, 64), torch.float32)  # kernels compiled
seedpack.compress({"w.weight": torch.randn(64, 64)}, sys.argv[2] + ".one", codec=codec, force=True)
from transformers import LlamaForCausalLM
from seedpack.hf.checkpoint_names import CheckpointNames
CheckpointNames.of_folder(__import__("pathlib").Path(sys.argv[1]))
report, found = watched(lambda: seedpack.compress(sys.argv[1], sys.argv[2], codec=codec, force=True))
print(json.dumps(found | {"weights": report.plan.packed_weights}))
"""
)

LOAD = (
    WATCH
    + """
def load_and_run(path):
    model = seedpack.load(path).eval()
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3, 4]]))
    return model
load_and_run(sys.argv[2])  # what is imported and compiled
model, found = watched(lambda: load_and_run(sys.argv[1]))
print(json.dumps(found | {"model": model.get_memory_footprint()}))
"""
)


CALIBRATE = (
    WATCH.replace(
        'int(open("/proc/self/statm").read().split()[1]) * page',
        'next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))',
    )
    + """
import shutil
from pathlib import Path
from seedpack import CompressOptions, Calibration
from seedpack.hf import language_model
from seedpack.converter.calibration.calibrate import calibrate
from seedpack.converter.options import silent
from seedpack.converter.pipeline import open_run
language_model.free_bytes = lambda: 0
ids = torch.randint(0, 16384, (8, 512))
def work(text):
    shutil.rmtree(sys.argv[2], ignore_errors=True)
    options = CompressOptions(calibration=Calibration(text, context=512))
    calibrate(open_run(sys.argv[1], Path(sys.argv[2]) / "out", options, silent))
work(ids[:1])
_, found = watched(lambda: work(ids))
print(json.dumps(found))
"""
)


class Unfitted(TrellisCodec):
    """Streams at random: loading does not look at them."""

    def encode(self, weight: Tensor, *args: Any, **options: Any) -> dict[str, Tensor]:
        return random_parts(self, (weight.shape[0], weight.shape[1]))


def build(name: str, dtype: torch.dtype, **shape: Any) -> Path:
    """A Llama of random weights, one shard per layer so that building it is cheap too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = CACHE / f"llama-{name}"
    if not (folder / "config.json").is_file():
        config = LlamaConfig(**shape, tie_word_embeddings=True)
        model: Any = LlamaForCausalLM(config)
        model.to(dtype).save_pretrained(folder, max_shard_size="100MB")
    return folder


def build_packed() -> Path:
    """A Llama of half a billion weights, packed at 4 bits."""
    packed = CACHE / "llama-half-a-billion-packed"
    if not (packed / "config.json").is_file():
        shape = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 32000, "num_hidden_layers": 8}
        folder = build("half-a-billion", torch.bfloat16, **shape, num_attention_heads=16, num_key_value_heads=4)
        seedpack.compress(folder, packed, codec=Unfitted(4), force=True)
        shutil.rmtree(folder)
    return packed


def probe(script: str, *paths: Path) -> dict[str, int]:
    """Run a script in a process of its own and return what it prints."""
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def loading(result: report.Result) -> None:
    """Peak memory of `seedpack.load` for Hugging Face folders."""
    small = models.packed_smollm2("trellis", 4)
    rows = []
    for name, folder, other in (
        ("SmolLM2-135M", small, small), ("Llama-shaped, 0.55 G weights", build_packed(), small)
    ):  # fmt: skip
        found = probe(LOAD, folder, other)
        size, added = size_of(folder), found["peak"] - found["before"]
        rows.append((
            name, f"{size / 1e6:.0f} MB", f"{found['model'] / 1e6:.0f} MB", f"{added / 1e6:.0f} MB",
            f"{(1.05 * size + 100e6) / 1e6:.0f} MB",
        ))  # fmt: skip
    result.say(
        "## Loading\n\nPeak resident memory that `seedpack.load` and a first pass of four tokens add to a process that has loaded "
        "and run a packed model before. (Files are mapped into memory: without the pass, hardly a page would be resident.) "
        "Target: the packed size × 1.05 + 100 MB."
    )
    result.table(["model at 4 bits", "packed on disk", "model in memory", "peak added", "target"], rows)


def calibrating(result: report.Result) -> None:
    """Peak memory of calibration on models that stay on disk."""
    rows = []
    for layers in (3, 12):
        folder = build(f"{layers}-layers", torch.float32, **SHAPE, num_hidden_layers=layers)
        found = probe(CALIBRATE, folder, CACHE / "footprint-calibration")
        rows.append((layers, f"{size_of(folder) / 1e6:.0f} MB", f"{(found['peak'] - found['before']) / 1e6:.0f} MB"))
    shutil.rmtree(CACHE / "footprint-calibration", ignore_errors=True)
    result.say(
        "## Calibration\n\nThe same models, taken to be larger than the free memory, so that their weights stay on disk; 4,096 "
        "tokens. Memory of its own (mapped files not counted) that calibration adds to a process that has run one before."
    )
    result.table(["layers", "model on disk", "peak added"], rows)


def measure(result: report.Result) -> None:
    largest = max(VOCABULARY * HIDDEN, INTERMEDIATE * HIDDEN) * 4 / 1e6
    result.say(
        f"Llama-shaped models of random float32 weights, hidden size {HIDDEN}, the embedding ({largest:.0f} MB) the largest "
        "tensor in each; `compress` with an 8-bit-seed `seedlm` (memory does not depend on the seeds' width but for one table). "
        "Resident memory by /proc, sampled every 2 ms; 'before' is the process with torch, transformers and the compiled "
        "kernels loaded. Target: at most 300 MB above the largest tensor's own needs, for any number of layers."
    )
    rows = []
    for layers in (3, 12):
        folder = build(f"{layers}-layers", torch.float32, **SHAPE, num_hidden_layers=layers)
        found = probe(COMPRESS, folder, CACHE / "footprint-out")
        added = (found["peak"] - found["before"]) / 1e6
        rows.append((
            layers, f"{found['weights'] / 1e6:.0f} M", f"{size_of(folder) / 1e6:.0f} MB", f"{found['before'] / 1e6:.0f} MB",
            f"{found['peak'] / 1e6:.0f} MB", f"{added:.0f} MB", f"{added - largest:.0f} MB",
        ))  # fmt: skip
    result.table(
        ["layers", "weights", "model on disk", "before", "peak", "added by compress", "above the largest tensor"], rows
    )
    loading(result)
    calibrating(result)

    times = []
    for _ in range(15):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "seedpack.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    bare = []
    for _ in range(15):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare.append(time.perf_counter() - started)
    result.say("## Start-up")
    result.table(
        ["", "median of 15"],
        [
            ("seedpack --help", f"{statistics.median(times):.3f} s"),
            ("python -c pass", f"{statistics.median(bare):.3f} s"),
        ],
    )


if __name__ == "__main__":
    report.run("footprint", "Memory and start-up", measure)
