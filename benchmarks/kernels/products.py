"""Fused products on the CPU beside torch's dense ones and the memory's limit; a whole model's generation."""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.lib import models, report
from seedpack.codecs.base import Codec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.dtypes import TORCH_DTYPES
from seedpack.kernels.basis import noise_basis

SIDE, NEW_TOKENS = 8192, 128
CODECS: dict[str, Codec] = {
    "trellis, 2 bits": TrellisCodec(2), "trellis, 3 bits": TrellisCodec(3), "trellis, 4 bits": TrellisCodec(4),
    "seedlm, 3 bits": SeedLMCodec(16, 12, 4), "seedlm, 4 bits": SeedLMCodec(),
}  # fmt: skip

GENERATE = """
import json, resource, sys, time, torch, seedpack
from transformers import AutoModelForCausalLM
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids, seconds = torch.tensor([[504, 3575, 282, 4649, 314]]), []
with torch.inference_mode():
    model.generate(ids, max_new_tokens=4, do_sample=False)
    for _ in range(3):
        started = time.perf_counter()
        model.generate(ids, min_new_tokens=int(sys.argv[2]), max_new_tokens=int(sys.argv[2]), do_sample=False)
        seconds.append(time.perf_counter() - started)
print(json.dumps({"seconds": min(seconds), "model": model.get_memory_footprint(), "added": resident() - before}))
"""


def milliseconds(*works: Callable[[], object], rounds: int = 9) -> list[float]:
    """Return the median time of each of several pieces of work, taken in turn."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(rounds + 1):
        for work, found in zip(works, times, strict=True):
            started = time.perf_counter()
            work()
            if turn:
                found.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(found) for found in times]


def random_parts(codec: Codec, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Parts that a codec could have written, of random bits: products take no longer for fitted ones."""
    parts = {}
    for name, (dtype, part_shape) in codec.parts(shape).items():
        kind = TORCH_DTYPES[dtype]
        if name in ("exponent", "exponent_bias"):
            parts[name] = torch.zeros(part_shape, dtype=kind)
        elif name == "scales":
            parts[name] = torch.rand(part_shape).half().view(kind)
        else:
            parts[name] = torch.randint(1, 256, part_shape, dtype=kind)
    return parts


def measure(result: report.Result) -> None:
    shape = (SIDE, SIDE)
    dense = torch.randn(shape)
    half = dense.bfloat16()
    copy = torch.empty_like(dense)
    gigabytes = 2 * dense.nbytes / milliseconds(lambda: copy.copy_(dense))[0] / 1e6
    del copy
    read = gigabytes  # a copy reads and writes: both are counted
    packed = {name: random_parts(codec, shape) for name, codec in CODECS.items()}
    rows = []
    for tokens in (1, 2, 4, 8, 16, 256):
        x = torch.randn(tokens, SIDE)
        x_half = x.bfloat16()
        rounds = 9 if tokens < 100 else 3
        for name, codec in CODECS.items():
            ours, single, bfloat = milliseconds(
                functools.partial(codec.matmul, x, packed[name], shape),
                functools.partial(linear, x, dense),
                functools.partial(linear, x_half, half),
                rounds=rounds,
            )
            floor = sum(part.nbytes for part in packed[name].values()) / read / 1e6
            rows.append(
                (tokens, name, f"{ours:.2f}", f"{single:.2f}", f"{bfloat:.2f}", f"{single / ours:.2f}×",
                 f"{bfloat / ours:.2f}×", f"{floor:.2f}")
            )  # fmt: skip
            print(rows[-1], flush=True)
    result.say(
        f"The whole product x·Wᵀ of a layer {list(shape)}, rotation included, against `torch.nn.functional.linear` with the dense "
        f"weight in float32 and in bfloat16, in turn in one run; medians, milliseconds. The floor is the time to read the packed "
        f"weight at the rate of a memory copy in the same run, {gigabytes:.0f} GB/s read and written. Random streams."
    )
    result.table(
        ["tokens", "codec", "packed", "dense fp32", "dense bf16", "faster than fp32", "than bf16", "floor"], rows
    )
    basis(result, dense)
    generation(result)


def basis(result: report.Result, dense: Tensor) -> None:
    """Weights that are noise times coefficients: M words of noise a weight."""
    rows = []
    for tokens in (1, 256):
        x = torch.randn(tokens, SIDE)
        for generator in ("philox", "squirrel5"):
            for count in (1, 4, 16):
                coefs = torch.randn(1, count)
                ours, single = milliseconds(
                    functools.partial(noise_basis(generator, 3).matmul, x, coefs, SIDE),
                    functools.partial(linear, x, dense),
                    rounds=3,
                )
                rows.append((tokens, generator, count, f"{ours:.0f}", f"{single:.0f}", f"{single / ours:.2f}×"))
                print(rows[-1], flush=True)
    result.say(
        "The same for a weight that is noise times M coefficients (RANDUMB's): M words of noise are generated for each weight, "
        "some 25 operations each with Philox (four at a time) and 13 with Squirrel5, so that time grows with M; in prefill it is "
        "spent once for all tokens."
    )
    result.table(["tokens", "generator", "M", "packed, ms", "dense fp32, ms", "faster than fp32"], rows)


def generation(result: report.Result) -> None:
    """SmolLM2-135M, whole, dense and packed, each in a process of its own."""
    folder = models.smollm2()
    rows: list[tuple[object, ...]] = []
    base: dict[str, Any] = {}
    for name in ("dense float32", "trellis, 4 bits", "seedlm, 4 bits"):
        path = folder
        if name != "dense float32":
            codec, _, bits = name.partition(", ")
            path = models.packed_smollm2(codec, int(bits[0]))
        command = [sys.executable, "-c", GENERATE, str(path), str(NEW_TOKENS)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        base = base or found
        rows.append(
            (name, f"{found['seconds']:.2f} s", f"{found['seconds'] / base['seconds']:.2f}×", f"{found['model'] / 1e6:.0f} MB",
             f"{found['model'] / base['model']:.2f}×", f"{found['added'] / 1e6:.0f} MB")
        )  # fmt: skip
        print(rows[-1], flush=True)
    result.say(
        f"SmolLM2-135M-Instruct, {NEW_TOKENS} tokens generated greedily by transformers, one sequence; the best of three, each model in "
        "a process of its own. 'Added' is the resident memory that loading and generating added to the process, compiled code included."
    )
    result.table(["model", "time", "of dense", "model in memory", "of dense", "added"], rows)


if __name__ == "__main__":
    report.run("kernels", "Fused products", measure)
