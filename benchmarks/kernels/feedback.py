"""Error feedback on real layers: blocks of how many weights, what else could be done at 2 bits, and the time of second moments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks.language.calibration import self_calibrated
from benchmarks.lib import models, report
from seedpack.codecs.importance import Importance
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.calibration.moments import add_products
from seedpack.converter.sources.open import open_source
from seedpack.kernels.trellis import feedback

Layer = tuple[Tensor, Tensor]  # a weight [out, in], and the Hessian of its input [in, in], both float64
LAYERS = ("layers.5.self_attn.q_proj", "layers.12.self_attn.o_proj", "layers.20.mlp.up_proj", "layers.12.mlp.down_proj")
BLOCKS: dict[str, Callable[[int], int]] = {
    "32": lambda columns: 32,
    "64": lambda columns: 64,
    "128": lambda columns: 128,
    "a twelfth of a row, 32 to 128": feedback.block_of,
}
TOKENS = 4096
LOW_RANK_BITS = 0.1


def errors_of(layers: list[Layer], bits: float) -> tuple[list[Tensor], float]:
    """Return the error E of each layer's weight, float64, and the seconds that all take to fit."""
    errors, seconds = [], 0.0
    for weight, hessian in layers:
        codec, started = TrellisCodec(bits).with_hessian(), time.perf_counter()
        parts = codec.encode(weight.float(), Importance.of(hessian))
        seconds += time.perf_counter() - started
        errors.append(codec.decode(parts, (weight.shape[0], weight.shape[1]), torch.float32).double() - weight)
    return errors, seconds


def decibels(errors: list[Tensor], layers: list[Layer]) -> Tensor:
    """Return the error of each layer's output over the output."""
    pairs = zip(errors, layers, strict=True)
    return torch.tensor([10 * torch.log10(((e @ h) * e).sum() / ((w @ h) * w).sum()) for e, (w, h) in pairs])


def rotated(layers: list[Layer]) -> list[Layer]:
    """Return the layers with their outputs in a random orthogonal basis."""
    torch.manual_seed(0)
    return [(torch.linalg.qr(torch.randn(len(w), len(w), dtype=torch.float64))[0] @ w, h) for w, h in layers]


def corrected(errors: list[Tensor], layers: list[Layer], bits: float) -> tuple[list[int], Tensor]:
    """Return the ranks that factors of 8 bits have for some bits per weight, and the dB that the best corrections of those ranks bring."""
    ranks, found = [], []
    for error, (_, hessian) in zip(errors, layers, strict=True):
        ranks.append(int(bits * error.numel() / (8 * sum(error.shape))))
        values = torch.linalg.svdvals(error @ torch.linalg.cholesky(hessian)).square()
        found.append(10 * torch.log10(values[ranks[-1] :].sum() / values.sum()))
    return ranks, torch.tensor(found)


def cells(values: Tensor) -> list[str]:
    return [*(f"{value:.2f}" for value in values.tolist()), f"{values.mean():.3f}"]


def milliseconds(run: Callable[[], object]) -> float:
    """Return the least time of ten runs."""
    taken = []
    for _ in range(10):
        started = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - started))
    return min(taken)


def measure(result: report.Result) -> None:
    folder = models.smollm2()
    source, store = open_source(folder), self_calibrated(folder, models.CACHE / "feedback" / "packed")
    layers: list[Layer] = []
    for name in LAYERS:
        moment = store.get(f"model.{name}.weight")
        assert moment is not None
        layers.append((source.read(f"model.{name}.weight").double(), moment.double()))
    errors_of(layers[:1], 4)  # compiles
    rows = []
    for bits in (4, 3, 2):
        for label, block_of in BLOCKS.items():
            with mock.patch.object(feedback, "block_of", block_of):
                errors, seconds = errors_of(layers, bits)
            rows.append((bits, label, *cells(decibels(errors, layers)), f"{seconds:.1f}"))
    result.say(
        "Error of a layer's output over the output, in dB, for four layers of SmolLM2-135M-Instruct (rescaled) with Hessians of 16,384 "
        "tokens that the model writes; `trellis`, effort `default`. Within a block errors are not compensated for; each block's walk "
        "goes 16 weights beyond it."
    )
    result.table(["k", "weights of a block", *LAYERS, "mean", "seconds"], rows)
    ranks, brought = corrected(errors, layers, LOW_RANK_BITS)
    turned = rotated(layers)
    changed = decibels(errors_of(turned, 2)[0], turned) - decibels(errors, layers)
    result.say(
        f"What else could be done at 2 bits, in dB of those errors. A correction of low rank with {LOW_RANK_BITS} bits per weight, in factors of 8 "
        f"bits (ranks {', '.join(map(str, ranks))}), is at best the largest singular values of E·C, E the error and C·Cᵀ the Hessian; "
        f"as many bits in the codes bring {20 * LOW_RANK_BITS * math.log10(2):.2f} dB."
    )
    result.table(
        ["", *LAYERS, "mean"],
        [
            ("a correction of low rank, at best", *cells(brought)),
            ("outputs in a random orthogonal basis", *cells(changed)),
        ],
    )
    result.say(f"Second moment of {TOKENS:,} inputs, in ms: all of it, and the lower triangle, which alone is summed.")
    rows = []
    for columns in (576, 1536, 4096):
        x, total = torch.randn(TOKENS, columns), torch.zeros(columns, columns)
        whole = milliseconds(lambda: total.addmm_(x.mT, x))  # noqa: B023
        lower = milliseconds(lambda: add_products(total, x))  # noqa: B023
        rows.append((columns, f"{whole:.0f}", f"{lower:.0f}"))
    result.table(["columns", "all", "lower triangle"], rows)


if __name__ == "__main__":
    report.run("feedback", "Error feedback", measure)
