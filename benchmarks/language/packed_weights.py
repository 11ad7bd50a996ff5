"""Weights that answer as dense ones: what reading them costs, that models run no slower for it, and mixtures of experts."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import seedpack
from benchmarks.lib import models, report
from benchmarks.lib.models import CACHE, ROOT
from seedpack.codecs.trellis import TrellisCodec
from seedpack.loader.layers import pack_module_

BEFORE = "ab29ead"  # the last commit in which `weight` was a stream of bytes
ROUNDS = 5
SMALL: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8,
}  # fmt: skip
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {
        "num_key_value_heads": 2, "head_dim": 64, "num_local_experts": 16, "num_experts_per_tok": 4,
    }),
    "DeepSeek V3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        "num_key_value_heads": 8, "first_k_dense_replace": 1, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 2,
        "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 256, "q_lora_rank": 256, "kv_lora_rank": 128,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    }),
    "Qwen3 MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        "num_key_value_heads": 2, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
        "decoder_sparse_step": 1,
    }),
}  # fmt: skip

TIMED = """
import json, sys, time, torch, transformers, seedpack
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.arange(1, 65)[None]
def generate():
    model.eval().generate(ids, max_new_tokens=48, min_new_tokens=48, do_sample=False, pad_token_id=0)
adapters = []
class Adapted(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Linear(layer.in_features, 8, bias=False)
        self.up = torch.nn.Linear(8, layer.out_features, bias=False)
        adapters.extend([*self.down.parameters(), *self.up.parameters()])
    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))
def train():
    model.train()(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
def timed(work, times):
    work()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return sorted(found)[times // 2]
seconds = {"generation": timed(generate, 3)}
for parameter in model.parameters():
    parameter.requires_grad_(False)
for name, layer in list(model.named_modules()):
    if name.endswith(("q_proj", "v_proj")):
        model.set_submodule(name, Adapted(layer))
optimizer = torch.optim.AdamW(adapters)
batch = torch.randint(1000, (2, 128))
seconds["LoRA step"] = timed(train, 3)
print(json.dumps(seconds))
"""


def least_time(work: Callable[[], object], times: int) -> float:
    """Return the least seconds of a call, of five rounds of some calls each."""
    found = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(times):
            work()
        found.append((time.perf_counter() - started) / times)
    return min(found)


def _read(layer: nn.Module, name: str) -> None:
    getattr(layer.weight, name)


def reading(result: report.Result) -> None:
    """Time what reading a packed weight's form costs, beside a dense one's."""
    dense = nn.Linear(4096, 4096)
    packed = pack_module_(nn.Linear(4096, 4096, device="meta"), TrellisCodec(4))
    rows = []
    for name in ("dtype", "shape", "device"):
        costs = [least_time(partial(_read, net, name), 20000) for net in (dense, packed)]
        rows.append((f"`layer.weight.{name}`", *(f"{1e6 * cost:.2f}" for cost in costs)))
    result.say("Reading the form of a weight [4096, 4096] decodes nothing. Microseconds:")
    result.table(("", "dense", "packed"), rows)


def seconds_of(root: Path, folder: Path) -> dict[str, float]:
    """Run the timed script with the seedpack of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", TIMED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=CACHE)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def before_and_after(result: report.Result) -> None:
    """Time generation and training of adapters with this tree and with the one before weights answered, in turn."""
    before = CACHE / f"before-{BEFORE}"
    if not before.exists():
        subprocess.run(
            ["git", "worktree", "add", "--detach", before, BEFORE], cwd=ROOT, check=True, capture_output=True
        )
    packed, dense = models.packed_smollm2("trellis", 4), models.smollm2()
    trees = {"before": (before, packed), "now": (ROOT, packed), "dense float32": (ROOT, dense)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for count in range(ROUNDS):
        for name, (root, folder) in trees.items():
            found[name].append(seconds_of(root, folder))
            print(f"round {count + 1} of {ROUNDS}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)
    result.say(
        f"SmolLM2-135M at 4 bits, seconds, medians of {ROUNDS} processes in turn, and the least, as other work on the machine only adds: 48 tokens generated after 64, and a step of "
        f"AdamW on adapters of rank 8 at q_proj and v_proj, 2 × 128 tokens. “Before” is commit {BEFORE}, in which `weight` "
        "was a stream of bytes."
    )
    works = list(found["now"][0])
    times = {name: {work: [row[work] for row in rows] for work in works} for name, rows in found.items()}
    result.table(("", *trees), [(work, *(_shown(times[name][work]) for name in trees)) for work in works])


def _shown(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f})"


def mixtures(result: report.Result) -> None:
    """Pack small mixtures of experts of real shapes, and time them beside the dense ones."""
    rows, ids = [], torch.arange(256)[None]
    for name, (cls, config, more) in MIXTURES.items():
        torch.manual_seed(0)
        folder = CACHE / f"mixture-{name}".replace(" ", "-").lower()
        make: Any = getattr(transformers, cls)
        model = make(getattr(transformers, config)(**SMALL, **more)).bfloat16()
        model.save_pretrained(folder)
        done = seedpack.compress(folder, f"{folder}-packed", settings={"effort": "fast"}, force=True)
        nets = [make.from_pretrained(path, dtype=torch.float32).eval() for path in (folder, f"{folder}-packed")]
        with torch.inference_mode():
            times = [least_time(partial(net, part), 1) for part in (ids, ids[:, :1]) for net in nets]
        totals = done.plan.totals()
        bits = (f"{totals['bits_per_packed_weight']:.3f}", f"{totals['bits_per_weight']:.3f}")
        rows.append((name, f"{totals['weights'] / 1e6:.1f} M", *bits, *(f"{1e3 * t:.0f}" for t in times)))
    result.say(
        "Mixtures of experts of random weights, of the real architectures' shapes but small: bits per weight over what is "
        "packed, and over all that is stored; milliseconds of a forward pass, beside the dense float32 model with "
        "transformers' default implementation of experts."
    )
    result.table(
        ("", "weights", "bits, packed", "bits, all", "256 tokens, dense", "packed", "one token, dense", "packed"), rows
    )


def measure(result: report.Result) -> None:
    reading(result)
    mixtures(result)
    before_and_after(result)


if __name__ == "__main__":
    report.run("packed_weights", "Weights that answer as dense ones", measure)
