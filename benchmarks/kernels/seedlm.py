"""SeedLM: distortion on Gaussian and real weights, and the speed of the exact search against its floor."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import TypeVar

import numba
import numpy as np
import torch

import seedpack
from benchmarks.lib import peers, report
from benchmarks.lib.models import smollm2
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.converter.sources.open import open_source
from seedpack.kernels.seedlm import search_reference as reference
from seedpack.kernels.seedlm.search import seedlm_search

GAUSSIAN = 1 << 20
LANES, DEPTH = 2048, 32
T = TypeVar("T")


def measure(result: report.Result) -> None:
    result.say("## Distortion on N(0, 1)")
    result.say(
        "About a million samples. D is the mean squared error, the gap is to the Gaussian rate–distortion limit 2^(−2R) at the "
        "row's own bits, everything stored counted. The paper's method tries one exponent per seed; `exponents=3` is the default."
    )
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    wide = torch.randn(1024, 1008, generator=torch.Generator().manual_seed(0))
    rows = []
    for bits, sample in ((4.0, weight), (3.0, wide)):
        for exponents in (1, 3):
            base = SeedLMCodec.from_bits(bits)
            codec = SeedLMCodec(base.seed_bits, base.block, base.rank, exponents)
            decoded, seconds = timed(functools.partial(rebuilt, codec, sample))
            rows.append(
                row(f"seedlm, exponents={exponents}", codec.bits_per_weight(tuple(sample.shape)), decoded, sample)
            )
            print(f"{rows[-1][0]} at {bits}: {sample.numel() / seconds:,.0f} weights/s", flush=True)
    for name, (decoded, bits) in {
        "NF4, double quantisation, g64": peers.nf4(weight),
        "round to nearest min/max g128": peers.rtn(weight, 4, 128),
        "symmetric, clipped for least error, g128": peers.rtn_clipped(weight, 4, 128),
        "symmetric, clipped for least error, g128 (3 bits)": peers.rtn_clipped(weight, 3, 128),
    }.items():
        rows.append(row(name, bits, decoded, weight))
    result.table(["method", "bits per weight", "D", "dB", "2^(−2R)", "gap"], rows)

    result.say("## Speed of the exact search")
    peak = multiply_add_rate()
    rows = []
    for bits in (4.0, 3.0):
        codec = SeedLMCodec.from_bits(bits)
        floor = (codec.block + codec.rank * (codec.rank + 3) / 2) * (2**codec.seed_bits - 1) / codec.block
        blocks = torch.randn(GAUSSIAN // 4 // codec.block, codec.block)

        def search(blocks: torch.Tensor, codec: SeedLMCodec = codec) -> object:
            return seedlm_search(blocks, None, -5, codec.code, exponents=codec.exponents)

        search(blocks[:64])
        seconds = min(timed(functools.partial(search, blocks))[1] for _ in range(3))
        rate = blocks.numel() / seconds
        brute = torch_brute_force(codec)
        rows.append((
            f"{bits:.0f}", f"{rate:,.0f}", f"{brute:,.0f}", f"{rate / brute:,.0f}×", f"{floor:,.0f}",
            f"{peak / floor:,.0f}", f"{100 * rate * floor / peak:.0f}%",
        ))  # fmt: skip
    result.say(
        "The floor is C + P(P+3)/2 multiply–adds in float32 for each of the 2^K − 1 seeds of a block "
        f"([why](../codecs/seedlm.md)). This machine's multiply–add rate, measured in the same run with independent "
        f"chains in registers, compiled by Numba as the search is: {peak / 1e9:.0f} G/s on {numba.get_num_threads()} cores. "
        "Brute force is the matrix product a first implementation would write: all pseudoinverses times the blocks in torch, "
        "float32, then rounding and errors of all seeds."
    )
    result.table(
        [
            "bits",
            "weights/s",
            "brute force in torch, weights/s",
            "ratio",
            "floor, multiply–adds per weight",
            "limit, weights/s",
            "of the limit",
        ],
        rows,
    )

    result.say("## Real weights")
    result.say(
        "SmolLM2-135M-Instruct, rescaled (see `benchmarks/lib/models.py`): relative error over some layers, in dB."
    )
    source = open_source(smollm2())
    rows = []
    for name in (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.9.mlp.down_proj.weight",
        "model.layers.29.mlp.up_proj.weight",
    ):
        real = source.read(name)
        cells = []
        for bits in (4.0, 3.0):
            codec = SeedLMCodec.from_bits(bits)
            cells.append(relative(codec.decode(codec.encode(real), tuple(real.shape), torch.float32), real))
        cells += [relative(decoded, real) for decoded, _ in (peers.nf4(real), peers.rtn(real, 4, 64))]
        rows.append((name, *cells))
    result.table(["tensor", "seedlm 4.000", "seedlm 3.000", "NF4 4.127", "min/max g64 4.500"], rows)
    check_bit_identity(result)


def check_bit_identity(result: report.Result) -> None:
    """decode(encode) before saving against what comes back from the file."""
    import tempfile
    from pathlib import Path

    weight = open_source(smollm2()).read("model.layers.3.self_attn.o_proj.weight")
    codec = SeedLMCodec()
    before = codec.decode(codec.encode(weight), tuple(weight.shape), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.safetensors"
        seedpack.compress({"w.weight": weight}, path, codec=codec)
        after = seedpack.load(path, dense=True)["w.weight"]
    result.say(
        f"decode(encode) after a save and a load: {'bit-identical' if torch.equal(before, after) else 'DIFFERENT'}."
    )


def row(name: str, bits: float, decoded: torch.Tensor, weight: torch.Tensor) -> tuple[object, ...]:
    error = float((decoded - weight).double().square().mean() / weight.double().square().mean())
    limit = 2 ** (-2 * bits)
    return (
        name,
        f"{bits:.4f}",
        f"{error:.5f}",
        f"{-10 * math.log10(error):.2f}",
        f"{limit:.5f}",
        f"{10 * math.log10(error / limit):.2f} dB",
    )


def relative(decoded: torch.Tensor, weight: torch.Tensor) -> str:
    return f"{10 * math.log10(float((decoded - weight).square().sum() / weight.square().sum())):.2f}"


def rebuilt(codec: SeedLMCodec, weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    return codec.decode(codec.encode(weight), (rows, columns), torch.float32)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    done = work()
    return done, time.perf_counter() - started


@numba.njit(parallel=True, fastmath=True)
def _chains(rounds: int, out: np.ndarray) -> None:
    for core in numba.prange(out.shape[0]):
        x = np.full(LANES, np.float32(1.0))
        for _ in range(rounds):
            a, b = np.float32(0.999) * x[0], np.float32(0.001)
            for i in range(np.uint64(LANES)):  # each element a chain in a register, the elements independent
                value = x[i]
                for _ in range(DEPTH):
                    value = value * a + b
                x[i] = value
        out[core] = x.sum()


def multiply_add_rate() -> float:
    """Multiply-adds a second in float32, all cores."""
    out = np.empty(numba.get_num_threads(), np.float32)
    rounds = 20_000
    _chains(10, out)
    seconds = min(timed(lambda: _chains(rounds, out))[1] for _ in range(3))
    return LANES * DEPTH * rounds * len(out) / seconds


def torch_brute_force(codec: SeedLMCodec) -> float:
    """Weights a second of the plain method: every seed's least-squares solution, rounded, its error, the minimum."""
    bases = reference.all_bases(codec.code).float()
    inverses = torch.linalg.pinv(bases.double()).float()
    blocks = torch.randn(8, codec.block)

    def search() -> torch.Tensor:
        best = torch.full((len(blocks),), torch.inf)
        for first in range(0, len(bases), 8192):
            t = torch.einsum("spc,nc->nsp", inverses[first : first + 8192], blocks)
            scale = torch.exp2(torch.ceil(torch.log2(t.abs().amax(-1, keepdim=True) / 7.5)))
            fitted = torch.einsum("scp,nsp->nsc", bases[first : first + 8192], (t / scale).round().clamp(-8, 7) * scale)
            best = torch.minimum(best, (blocks[:, None] - fitted).square().sum(-1).amin(1))
        return best

    search()
    return blocks.numel() / min(timed(search)[1] for _ in range(3))


if __name__ == "__main__":
    report.run("seedlm", "SeedLM: distortion and the exact search", measure)
