"""Fused products on a GPU beside cuBLAS, a memory copy and other 4-bit kernels; tokens per second of whole models."""

from __future__ import annotations

import functools
import importlib.util
import math
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.kernels.products import random_parts
from benchmarks.lib import models, report
from seedpack.codecs.base import Codec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.kernels.common import gpu_configs as configs
from seedpack.kernels.common import gpu_launch as launch
from seedpack.kernels.common.row_tiles import FEW_TOKENS
from seedpack.loader.layers import pack_module_

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]
FEW, MANY = (1, 4, 8, 2, 16), (256, 4096)  # tokens, the most telling counts first
CODECS = {"trellis, 2 bits": TrellisCodec(2), "trellis, 3 bits": TrellisCodec(3), "trellis, 4 bits": TrellisCodec(4),
          "seedlm, 4 bits": SeedLMCodec()}  # fmt: skip
ENCODERS: dict[str, Codec] = {
    "seedlm, 4 bits, paper's rule": SeedLMCodec(exponents=1), "seedlm, 4 bits": SeedLMCodec(), "trellis, 4 bits": TrellisCodec(4),
    "trellis, 4 bits, best, L = 16": TrellisCodec(4, 16, effort="best"), "trellis, 2 bits, best": TrellisCodec(2, effort="best"),
}  # fmt: skip
CACHE_BYTES = 100 << 20  # inputs are taken in turn over more than any L2 cache holds
MODELS = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip


def microseconds(works: list[Callable[[], object]]) -> float:
    """Median time of a piece of work in a CUDA graph, where launching costs next to nothing; other copies of its weight each time."""
    for work in works:  # compiles, measures configurations, and makes what is kept beside a weight
        work()
    turn = iter(range(1 << 30))
    bench = triton.testing.do_bench_cudagraph
    return 1e3 * float(bench(lambda: works[next(turn) % len(works)](), return_mode="median"))


def copies(nbytes: int) -> int:
    return max(1, min(16, 2 * CACHE_BYTES // nbytes))


def on_device(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.cuda() for name, part in parts.items()}


def torchao_layer(shape: tuple[int, int]) -> Callable[[Tensor], Tensor] | None:
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(shape[1], shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
    try:
        quantize_(layer, Int4WeightOnlyConfig(group_size=128))
        layer(torch.zeros(1, shape[1], device="cuda", dtype=torch.bfloat16))
    except (ImportError, RuntimeError, NotImplementedError, AssertionError) as error:
        print(f"torchao int4 does not run here: {error}", file=sys.stderr)
        return None
    return layer


def bitsandbytes_layer(shape: tuple[int, int]) -> Callable[[Tensor], Tensor] | None:
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    from bitsandbytes.nn import Linear4bit

    nf4: Callable[[Tensor], Tensor] = Linear4bit(
        shape[1], shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    ).cuda()
    return nf4


class Clock:
    """The time that a stage has; what it does not get done in it is left out, and said so."""

    def __init__(self, seconds: float):
        self._end = time.perf_counter() + seconds
        self.left_out: list[object] = []

    def allows(self, row: object) -> bool:
        """Return whether there is time for a row, and note it if there is none."""
        if time.perf_counter() < self._end:
            return True
        self.left_out.append(row)
        return False

    def note(self, result: report.Result) -> None:
        if self.left_out:
            result.say(f"Left out, for want of time: {', '.join(map(str, self.left_out))}.")


def correctness(result: report.Result, clock: Clock) -> None:
    """The tests of the kernels on this device, as many as the time allows."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu and not slow",
        "tests",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, cwd=models.ROOT)
        said = (done.stdout.strip().splitlines() or ["nothing"])[-1]
        if done.returncode:
            print(done.stdout[-4000:], file=sys.stderr)
    except subprocess.TimeoutExpired as stopped:
        so_far = (stopped.stdout or b"").decode()
        said = f"stopped after 90 s: {so_far.count('.')} passed, {so_far.count('F')} failed so far"
    result.say(f"Tests on the device (`pytest -m gpu`): {said}.")


def decode(result: report.Result, clock: Clock) -> None:
    """Few tokens, float and 8-bit activations, one row for each layer, count of tokens and codec."""
    rows = []
    dense: dict[tuple[tuple[int, int], int], tuple[float, float]] = {}
    peers: dict[tuple[int, int], list[Any]] = {}
    for tokens in FEW:
        for codec_name, codec in CODECS.items():
            for shape in SHAPES:
                label = f"{shape[0]}×{shape[1]}, {tokens} tokens, {codec_name}"
                if not clock.allows(label):
                    continue
                x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
                if (shape, tokens) not in dense:
                    dense[shape, tokens] = _dense(shape, x)
                    peers.setdefault(shape, [bitsandbytes_layer(shape), torchao_layer(shape)])
                copy, cublas = dense[shape, tokens]
                parts = random_parts(codec, shape)
                stored = sum(part.nbytes for part in parts.values())
                some = [on_device(parts) for _ in range(copies(stored))]
                ours = microseconds([functools.partial(codec.matmul, x, p, shape) for p in some])
                row = [
                    f"{shape[0]}×{shape[1]}",
                    tokens,
                    codec_name,
                    f"{copy:.1f}",
                    f"{cublas:.1f}",
                    f"{ours:.1f}",
                    f"{cublas / ours:.2f}×",
                ]
                rounded = math.nan
                if codec.int8_activations and tokens <= FEW_TOKENS:
                    rounded = microseconds([functools.partial(codec.matmul, x, p, shape, int8=True) for p in some])
                row += [f"{rounded:.1f}", f"{cublas / rounded:.2f}×"]
                row.append(f"{copy * stored / (4 * shape[0] * shape[1]):.1f}")
                row += [
                    "" if peer is None else f"{microseconds([functools.partial(peer, x)]):.1f}" for peer in peers[shape]
                ]
                rows.append(row)
                print(row, flush=True)
    result.say(
        f"{torch.cuda.get_device_name()}. Products in bfloat16, microseconds, medians; each in a CUDA graph. 'Copy' reads and writes the "
        "bfloat16 weight; the floor is the packed bytes at the rate of that copy. Each product takes another copy of its weight than the "
        "one before, so that none is in the L2 cache; the peers' stays there. 'int8': with activations rounded to 8 bits."
    )
    result.table(
        [
            "layer",
            "tokens",
            "codec",
            "copy",
            "cuBLAS",
            "packed",
            "faster",
            "int8",
            "faster",
            "floor",
            "bitsandbytes NF4",
            "torchao int4",
        ],
        rows,
    )
    clock.note(result)


def _dense(shape: tuple[int, int], x: Tensor) -> tuple[float, float]:
    """Return microseconds of a copy of the bfloat16 weight, and of cuBLAS."""
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * shape[0] * shape[1]))]
    target = torch.empty_like(weights[0])
    copy = microseconds([functools.partial(target.copy_, weight) for weight in weights])
    return copy, microseconds([functools.partial(linear, x, weight) for weight in weights])


def prefill(result: report.Result, clock: Clock) -> None:
    """Hundreds of tokens, beside cuBLAS."""
    rows = []
    for shape in SHAPES[:2]:
        for tokens in MANY:
            x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
            cublas = _dense(shape, x)[1]
            for name, codec in CODECS.items():
                if not clock.allows(f"{shape[0]}×{shape[1]}, {tokens} tokens, {name}"):
                    continue
                parts = on_device(random_parts(codec, shape))
                ours = microseconds([functools.partial(codec.matmul, x, parts, shape)])
                rows.append(
                    (f"{shape[0]}×{shape[1]}", tokens, name, f"{cublas:.0f}", f"{ours:.0f}", f"{cublas / ours:.2f}×")
                )
                print(rows[-1], flush=True)
    result.say("Prefill: the same for hundreds of tokens.")
    result.table(["layer", "tokens", "codec", "cuBLAS", "packed", "faster"], rows)
    clock.note(result)


def encoders(result: report.Result, clock: Clock) -> None:
    """Weights fitted a second."""
    shape, rows = (2048, 4096), []
    weight = torch.randn(shape, device="cuda")
    for label, codec in ENCODERS.items():
        if not clock.allows(label):
            continue
        codec.encode(weight[:64])  # compiles, and makes tables
        torch.cuda.synchronize()
        started = time.perf_counter()
        parts = codec.encode(weight)
        torch.cuda.synchronize()
        rate = weight.numel() / (time.perf_counter() - started)
        decoded = codec.decode(parts, shape, torch.float32)
        error = 10 * math.log10(float((decoded - weight).square().sum() / weight.square().sum()))
        rows.append((label, f"{rate / 1e6:.1f} M", f"{error:.3f} dB", f"{codec.bits_per_weight(shape):.3f}"))
        print(rows[-1], flush=True)
    result.say(f"Fitting N(0, 1), {list(shape)}, on the GPU:")
    result.table(["codec", "weights/s", "relative error", "bits per weight"], rows)
    clock.note(result)


def configurations(result: report.Result) -> None:
    """Say what `triton.autotune` chose, for `seedpack.kernels.common.gpu_configs.TUNED`."""
    rows = [
        (name, str(tile and tile.__name__), str(key), str(config))
        for (name, tile), tuner in launch.tuners.items() for key, config in tuner.cache.items()
    ]  # fmt: skip
    result.say(f"Configurations found for {configs.architecture(torch.device('cuda'))}:")
    result.table(["kernel", "weight", "sizes", "configuration"], rows)


def graph_of(model: Any, ids: Tensor) -> Callable[[], None]:
    """One forward pass of one token, captured."""
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                model(ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(ids, use_cache=False)
    return graph.replay


def llama(shape: dict[str, int], codec: TrellisCodec | None) -> Any:
    """A Llama of random weights in bfloat16, its linear layers packed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=128256)).bfloat16().eval()  # type: ignore[arg-type]
    for module in list(model.modules()):
        if codec is not None and isinstance(module, torch.nn.Linear):
            rows, columns = module.weight.shape
            pack_module_(module, codec, on_device(random_parts(codec, (rows, columns))))
    return model


def whole_models(result: report.Result, clock: Clock) -> None:
    ids = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    rows, base = [], 0.0
    for size, shape in MODELS.items():
        for bits in (None, 4, 2):
            if not clock.allows(f"{size}, {bits or 16} bits"):
                continue
            model = llama(shape, None if bits is None else TrellisCodec(bits))
            found = 1e3 * float(triton.testing.do_bench(graph_of(model, ids), return_mode="median"))
            base = found if bits is None else base
            label = "bfloat16" if bits is None else f"trellis, {bits} bits"
            memory = model.get_memory_footprint() / 1e9
            rows.append((size, label, f"{1e6 / found:.0f}", f"{base / found:.2f}×", f"{memory:.2f} GB"))
            print(rows[-1], flush=True)
            del model
    result.say(
        "Whole Llama-shaped models of random weights, one token in one CUDA graph (no key–value cache), the embedding dense:"
    )
    result.table(["model", "weights", "tokens/s", "of bfloat16", "memory"], rows)
    clock.note(result)


# Each stage and its seconds, the most important first: 8 minutes in all, compiling included. `--only` names some.
STAGES: dict[str, tuple[Callable[[report.Result, Clock], None], float]] = {
    "correctness": (correctness, 90), "decode": (decode, 160), "encoders": (encoders, 60), "models": (whole_models, 100),
    "prefill": (prefill, 50),
}  # fmt: skip


def measure(result: report.Result) -> None:
    if not torch.cuda.is_available():
        print("left out: there is no GPU here", file=sys.stderr)
        raise SystemExit(0)
    for name, (stage, seconds) in STAGES.items():
        if result.wanted(name):
            started = time.perf_counter()
            stage(result, Clock(seconds))
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            result.keep()
    configurations(result)


if __name__ == "__main__":
    report.run("gpu", "Fused products on a GPU", measure)
