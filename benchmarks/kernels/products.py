"""Fused products on the CPU beside torch's dense ones and the memory's limit; a whole model's generation."""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.lib import models, report
from benchmarks.lib.processor import environment
from seedpack.codecs.base import Codec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.dtypes import TORCH_DTYPES
from seedpack.kernels.basis import noise_basis
from seedpack.kernels.common import few_tokens
from seedpack.kernels.common.row_tiles import FEW_TOKENS
from seedpack.loader.layers import pack_module_

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


def packed_layer(codec: Codec, shape: tuple[int, int], int8: bool | None = None) -> Any:
    """Return a packed linear layer of random bits, without a bias, as models hold it."""
    with torch.device("meta"):
        layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    packed = pack_module_(layer, codec, random_parts(codec, shape), dtype=torch.float32)
    packed.int8_activations = int8
    return packed


def read_bandwidth(values: Tensor) -> float:
    """Return the gigabytes per second at which a tensor far larger than caches is summed up."""
    return values.nbytes / milliseconds(values.sum)[0] / 1e6


@torch.inference_mode()
def measure(result: report.Result) -> None:
    shape = (SIDE, SIDE)
    dense = torch.randn(shape)
    half = dense.bfloat16()
    read = read_bandwidth(torch.ones(1 << 28))
    layers = {name: packed_layer(codec, shape) for name, codec in CODECS.items()}
    for name, int8 in (("floats", False), ("bytes", True)):
        layers[f"trellis, 4 bits, {name}"] = packed_layer(TrellisCodec(4), shape, int8)
    rows = []
    for tokens in (1, 2, 4, 8, 16, 256):
        x = torch.randn(tokens, SIDE)
        x_half = x.bfloat16()
        rounds = 9 if tokens < 100 else 3
        for name, layer in layers.items():
            if tokens <= FEW_TOKENS and name.endswith("bytes"):
                continue  # as by default
            ours, single, bfloat = milliseconds(
                functools.partial(layer, x),
                functools.partial(linear, x, dense),
                functools.partial(linear, x_half, half),
                rounds=rounds,
            )
            stored = sum(part.nbytes for part in layer.packed_parts().values())
            rows.append(
                (tokens, name, f"{ours:.2f}", f"{single:.2f}", f"{bfloat:.2f}", f"{single / ours:.2f}×",
                 f"{bfloat / ours:.2f}×", f"{stored / read / 1e6:.2f}", f"{100 * stored / ours / read / 1e6:.0f}%")
            )  # fmt: skip
            print(rows[-1], flush=True)
    result.say(
        f"A packed linear layer {list(shape)}, called as a model calls it (rotation and rounding included), against "
        f"`torch.nn.functional.linear` with the dense weight in float32 and in bfloat16, in turn in one run; medians, milliseconds. The "
        f"floor is the time to read the packed weight at the rate of a sum over 1 GB in the same run, {read:.1f} GB/s; its share is how "
        "much of that rate the product reaches. Random streams. Up to 8 tokens activations of trellis layers have 8 bits; 'floats' is "
        "`int8_activations=False`. More tokens are multiplied in bytes up to 3 bits, at 4 with `int8_activations=True`, 'bytes'."
    )
    result.table(
        [
            "tokens",
            "codec",
            "packed",
            "dense fp32",
            "dense bf16",
            "faster than fp32",
            "than bf16",
            "floor",
            "of the rate",
        ],
        rows,
    )
    ways(result)
    overhead(result)
    basis(result, dense)
    generation(result)


def ways(result: report.Result) -> None:
    """One token, by each way of multiplying bytes and by one core and all, in processes that leave out features of the processor."""
    rows: list[tuple[object, ...]] = []
    for way in ("vnni512", "vnni256", "avx2", "any"):
        if (changed := environment(way)) is None:
            continue
        command = [sys.executable, "-c", "from benchmarks.kernels.products import one_way; one_way()"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=changed, cwd=models.ROOT)
        for found in json.loads(done.stdout.splitlines()[-1]):
            rows.append((way, *found))
            print(rows[-1], flush=True)
    result.say(
        "One token by each way of multiplying bytes ([kernels](../kernels.md#up-to-8-tokens-in-integers)): this machine's, and those of "
        "processors with fewer features, by leaving these out of what is compiled (torch's own products stay as they are). Milliseconds; "
        "gigaweights per second; the share of the rate at which as many threads read memory."
    )
    result.table(
        ["way", "bits", "threads", "packed", "Gweights/s", "dense bf16", "faster than bf16", "of the rate"], rows
    )


@torch.inference_mode()
def one_way() -> None:
    """Print the rows of `ways` that this process can measure, as JSON."""
    shape, rows = (SIDE, SIDE), []
    half, x, large = torch.randn(shape).bfloat16(), torch.randn(1, SIDE), torch.ones(1 << 28)
    for bits in (2, 4):
        layer = packed_layer(TrellisCodec(bits), shape)
        stored = sum(part.nbytes for part in layer.packed_parts().values())
        for threads in sorted({1, torch.get_num_threads()}):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            read = read_bandwidth(large)
            ours, bfloat = milliseconds(functools.partial(layer, x), functools.partial(linear, x.bfloat16(), half))
            torch.set_num_threads(before)
            rows.append(
                (bits, threads, f"{ours:.2f}", f"{SIDE * SIDE / ours / 1e6:.1f}", f"{bfloat:.2f}", f"{bfloat / ours:.2f}×",
                 f"{100 * stored / ours / read / 1e6:.0f}%")
            )  # fmt: skip
    print(json.dumps(rows))


@contextmanager
def _timed_products() -> Iterator[list[float]]:
    """Collect the seconds of compiled products of few tokens."""
    seconds: list[float] = []
    inner = few_tokens._run

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        same = inner(*arguments)
        seconds.append(time.perf_counter() - started)
        return same

    with unittest.mock.patch.object(few_tokens, "_run", timed):
        yield seconds


@torch.inference_mode()
def overhead(result: report.Result) -> None:
    """Time a call of a small packed layer beside its compiled product."""
    rows: list[tuple[object, ...]] = []
    repeats = 200
    for shape in ((16, 64), (192, 576), (576, 576), (1536, 576), (2048, 2048)):
        layer, plain = packed_layer(TrellisCodec(4), shape), torch.nn.Linear(shape[1], shape[0], bias=False)
        x = torch.randn(1, shape[1])
        layer(x)

        def often(work: Callable[[Tensor], object], given: Tensor = x) -> Callable[[], None]:
            def repeated() -> None:
                for _ in range(repeats):
                    work(given)

            return repeated

        whole, dense = milliseconds(often(layer), often(plain))
        with _timed_products() as spent:
            often(layer)()
        product = 1e6 * sum(spent) / repeats
        whole, dense = 1e3 * whole / repeats, 1e3 * dense / repeats
        rows.append((list(shape), f"{whole:.1f}", f"{product:.1f}", f"{whole - product:.1f}", f"{dense:.1f}"))
        print(rows[-1], flush=True)
    result.say(
        "A call of a packed layer with one token, in a loop: microseconds of the call, of its compiled product (which mixes and rounds), and "
        "what is left, which is Python's and torch's; beside a dense float32 layer, whose weight is in the caches here."
    )
    result.table(["layer", "call", "compiled", "overhead", "dense fp32"], rows)


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
