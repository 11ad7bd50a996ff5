"""The trellis on N(0, 1): distortion against time for each effort, beside other quantisers and the limit."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from benchmarks.lib import peers, report
from seedpack.codecs.trellis import TrellisCodec
from seedpack.codecs.trellis_effort import EFFORTS, RATES
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode import trellis_decode
from seedpack.prng import trellis_key

SHAPE = (256, 4096)
TARGETS: dict[str, dict[float, float]] = {"best": {2: 0.35, 3: 0.45, 4: 0.55}, "default": {2: 0.45, 3: 0.60, 4: 0.70}}
PRICE = 0.15  # dB that two weights per window may cost at best, where they are usual


def gap(decoded: Tensor, sample: Tensor, bits: float) -> float:
    """dB above the rate–distortion limit 2^(-2R) at all the bits stored."""
    error = float((decoded - sample).double().square().sum() / sample.double().square().sum())
    return 10 * math.log10(error * 4**bits)


def measure(result: report.Result) -> None:
    sample = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    rows, points = [], []
    for effort in EFFORTS:
        forms = [(1, k) for k in (range(1, 9) if effort == "default" else (2, 3, 4))] + [(2, k) for k in RATES[2]]
        for weights, code_bits in forms:
            codec = TrellisCodec(code_bits, effort=effort, balance=False, weights_per_window=weights)
            codec.encode(sample[:4])  # compiles
            runs = 1 if effort == "best" else 3
            seconds, parts = min((timed(codec, sample) for _ in range(runs)), key=lambda run: run[0])
            bits = codec.bits_per_weight(SHAPE)
            found = gap(codec.decode(parts, SHAPE, torch.float32), sample, bits)
            target = TARGETS.get(effort, {}).get(code_bits)
            if target and weights == 2 and effort == "best":
                target = target + PRICE if code_bits <= EFFORTS[effort].pairs else None
            rows.append(
                (code_bits, weights, effort, codec.state_bits, codec.survivors, f"{bits:.4f}", f"{found:.3f}",
                 "" if target is None else f"≤ {target:.2f}" + ("" if found <= target else " (missed)"),
                 f"{sample.numel() / seconds / 1e6:.3f}")
            )  # fmt: skip
            points.append((f"{code_bits} bits, {weights} per window", effort, sample.numel() / seconds / 1e6, found))
            print(rows[-1], flush=True)
    result.say(
        f"{sample.numel():,} samples of N(0, 1) as a matrix {list(SHAPE)}; the gap is the squared error in dB above the "
        "rate–distortion limit 2^(−2R), with R all the bits that are stored, scales included. Encoding of the whole codec "
        "(rotation, search, scales; without the balance of channels, which are alike here) on all cores, compiled code, the best of three runs (one for `best`)."
    )
    result.table(
        ["k", "weights per window", "effort", "L", "m", "bits per weight", "gap, dB", "target", "million weights/s"],
        rows,
    )
    others = []
    for label, (_, quantise) in peers.data_free().items():
        if not label.startswith(("HQQ", "GGUF IQ2")):
            rebuilt, bits = quantise(sample)
            others.append((label, f"{bits:.4f}", f"{gap(rebuilt, sample, bits):.3f}"))
    result.say("Others on the same samples (HQQ and IQ2_S take minutes for them; SeedLM: [seedlm](seedlm.md)):")
    result.table(["", "bits per weight", "gap, dB"], others)
    floor(
        result,
        next(speed for form, effort, speed, _ in points if (form, effort) == ("4 bits, 1 per window", "default")),
    )
    decoding(result)
    plot(result, points)


def timed(codec: TrellisCodec, sample: Tensor) -> tuple[float, dict[str, Tensor]]:
    started = time.perf_counter()
    parts = codec.encode(sample)
    return time.perf_counter() - started, parts


def floor(result: report.Result, measured: float) -> None:
    """The search's operations beside the machine's, and beside the million weights per second that were measured."""
    codec, cores = TrellisCodec(4), torch.get_num_threads()
    edges = 1 << codec.survivors + codec.code.symbol_bits
    cycles = 2 * edges / 16
    result.say(
        f"The search of `default` at k = 4 costs {edges:,} edges per weight; 16 of them cost an addition, two products of bytes and "
        f"of halves (VNNI) and a minimum. A core that begins one such product in each cycle takes {cycles:,.0f} cycles per weight, so "
        f"{cores} cores at 3 GHz can search {cores * 3e3 / cycles:.2f} million weights/s; measured {measured:.2f}. The rest goes into "
        "laying out each step's survivors (words, metrics and the way back) and the rotation."
    )


def decoding(result: report.Result) -> None:
    """Integers of a matrix from its stream, and the copy of memory that a dense float32 matrix would cost."""
    rows = []
    for weights, code_bits in ((1, 2), (1, 3), (1, 4), (2, 2), (2, 3)):
        stream = torch.randint(0, 256, (4096, 512, code_bits), dtype=torch.uint8).view(4096, -1, 1)
        code = TrellisCode(code_bits, 16, trellis_key(0), weights=weights)
        seconds = {}
        for backend in ("cpu", "reference"):
            trellis_decode(stream[:8], code, columns=4096, backend=backend)
            count = 4096 if backend == "cpu" else 256
            started = time.perf_counter()
            trellis_decode(stream[:count], code, columns=4096, backend=backend)
            seconds[backend] = (time.perf_counter() - started) / count * 4096
        rows.append((code_bits, weights, *(f"{4096 * 4096 / seconds[b] / 1e6:,.0f}" for b in ("cpu", "reference"))))
    source = torch.empty(4096, 4096)
    target = torch.empty_like(source)
    target.copy_(source)
    started = time.perf_counter()
    target.copy_(source)
    copy = 4096 * 4096 / (time.perf_counter() - started) / 1e6
    result.say(f"Decoding to integers, 4096×4096, million weights/s (a copy of the float32 matrix: {copy:,.0f}):")
    result.table(["k", "weights per window", "cpu", "reference"], rows)


def plot(result: report.Result, points: list[tuple[str, str, float, float]]) -> None:
    """The frontier: gap against speed, a line for each form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), dpi=120)
    for form in dict.fromkeys(form for form, effort, _, _ in points if effort == "best"):
        line = [(speed, found) for own, _, speed, found in points if own == form]
        axes.plot(
            [p[0] for p in line], [p[1] for p in line], "o-" if form.endswith("1 per window") else "s--", label=form
        )
    axes.set(xscale="log", xlabel="million weights per second, all cores", ylabel="dB above 2^(−2R)", ylim=(0, None),
             title="trellis on N(0, 1): distortion against time; from the left best, default and fast")  # fmt: skip
    axes.grid(which="both", alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(report.FOLDER / f"{result.name}.png")
    pyplot.close(figure)
    result.say(f"![Distortion against time]({result.name}.png)")


if __name__ == "__main__":
    report.run("trellis", "The trellis on N(0, 1)", measure)
