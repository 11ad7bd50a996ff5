"""The search for the trellis's multipliers: random ones screened on N(0, 1), the best beside those of the format."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from benchmarks.lib import report
from seedpack import prng
from seedpack.codecs.trellis import TrellisCodec

CANDIDATES, REFINED = 256, 6
SCREEN, SAMPLE = (48, 1024), (256, 2048)
PUBLISHED = {"QTIP's 1MAD": 34038481, "EXL3's mul1": 0x83DCD12D}


def gap(form: tuple[int, float], multiplier: int, sample: Tensor) -> float:
    """dB above 4^-k of the code of a form (weights per window, bits) with another multiplier, effort `default`."""
    weights, code_bits = form
    codec = TrellisCodec(code_bits, balance=False, weights_per_window=weights, multiplier=multiplier)
    shape = (sample.shape[0], sample.shape[1])
    decoded = codec.decode(codec.encode(sample), shape, torch.float32)
    error = (decoded - sample).double().square().sum() / sample.double().square().sum()
    return float(10 * torch.log10(error * 4**code_bits))


def measure(result: report.Result) -> None:
    generator = torch.Generator().manual_seed(1)
    small, large = torch.randn(SCREEN, generator=generator), torch.randn(SAMPLE, generator=generator)
    odd = torch.randint(0, 1 << 31, (CANDIDATES,), generator=generator).mul(2).add(1).tolist()
    rows = []
    for form, (chosen, _) in list(prng.TRELLIS_MULTIPLIERS.items()):
        screened = sorted((gap(form, multiplier, small), multiplier) for multiplier in odd)
        best = min((gap(form, multiplier, large), multiplier) for _, multiplier in screened[:REFINED])
        rows.append(
            (*form, f"{chosen:08X}", f"{gap(form, chosen, large):.3f}", f"{best[1]:08X}", f"{best[0]:.3f}",
             f"{statistics.median(g for g, _ in screened):.3f}", f"{screened[-1][0]:.3f}",
             *(f"{gap(form, multiplier, large):.3f}" for multiplier in PUBLISHED.values()))
        )  # fmt: skip
        print(rows[-1], flush=True)
    result.say(
        f"dB above 4^−k, effort `default`, L = 16: each of {CANDIDATES} random odd multipliers on {SCREEN[0] * SCREEN[1]:,} "
        f"samples, the best {REFINED} of them, the format's own (M24, found so among some thousands) and two published ones "
        f"on {SAMPLE[0] * SAMPLE[1]:,} others."
    )
    result.table(
        ["weights per window", "k", "M24", "gap", "best here", "gap", "median", "worst", *PUBLISHED],
        rows,
    )


if __name__ == "__main__":
    report.run("multipliers", "The trellis's multipliers", measure)
