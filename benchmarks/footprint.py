"""Peak memory of compress, which must not grow with the number of layers, and the time of seedpack --help."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import report
from models import CACHE

HIDDEN, INTERMEDIATE, VOCABULARY = 1024, 2816, 16384

PROBE = """
import json, resource, sys, threading, time
page = resource.getpagesize()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * page
import seedpack, seedpack.api
from seedpack.codecs.seedlm import SeedLMCodec
import torch, transformers
codec = SeedLMCodec(8, 8, 3)
codec.decode(codec.encode(torch.randn(64, 64)), (64, 64), torch.float32)  # kernels compiled
seedpack.compress({"w.weight": torch.randn(64, 64)}, sys.argv[2] + ".one", codec=codec, force=True)
from transformers import LlamaForCausalLM
from seedpack.model.skeleton import Skeleton
Skeleton.of_folder(__import__("pathlib").Path(sys.argv[1]))
before, peak, done = resident(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
report = seedpack.compress(sys.argv[1], sys.argv[2], codec=codec, force=True)
done = True
thread.join()
print(json.dumps({"before": before, "peak": peak, "weights": report.plan.packed_weights}))
"""


def build(layers: int) -> Path:
    """A Llama of random weights, float32, one shard a layer so that building it is cheap too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = CACHE / f"llama-{layers}-layers"
    if not (folder / "config.json").is_file():
        config = LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, vocab_size=VOCABULARY, num_hidden_layers=layers,
            num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100MB")
    return folder


def peak(layers: int) -> tuple[float, float, int, int]:
    folder = build(layers)
    command = [sys.executable, "-c", PROBE, str(folder), str(CACHE / "footprint-out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return found["before"] / 1e6, found["peak"] / 1e6, found["weights"], size


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
        before, top, weights, size = peak(layers)
        rows.append((
            layers, f"{weights / 1e6:.0f} M", f"{size / 1e6:.0f} MB", f"{before:.0f} MB", f"{top:.0f} MB",
            f"{top - before:.0f} MB", f"{top - before - largest:.0f} MB",
        ))  # fmt: skip
    result.table(
        ["layers", "weights", "model on disk", "before", "peak", "added by compress", "above the largest tensor"], rows
    )

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
