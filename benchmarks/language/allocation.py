"""Measure what spreading bits over tensors brings at equal bytes: by their sizes, and by what the packed model is measured to lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any
from unittest import mock

from benchmarks.language.calibration import Subject
from benchmarks.lib import models, pages, report
from seedpack import Calibration
from seedpack.converter.budget import FUSED
from seedpack.converter.calibration import measuring

SETTINGS = {"effort": "fast"}
LINEAR: tuple[str, ...] = ("*embed*",)  # what is excluded
EVERYTHING: tuple[str, ...] = ()
# By label: the bits, what stays out, and whether the bits of a fraction are spread by measuring.
WAYS: dict[str, tuple[float, tuple[str, ...], bool]] = {
    "linear layers, 4 each": (4, LINEAR, False),
    "linear layers, 4.03 by sizes": (4.03, LINEAR, False),
    "linear layers, 4.03 measured": (4.03, LINEAR, True),
    "linear layers, 3 each": (3, LINEAR, False),
    "linear layers, 3.03 by sizes": (3.03, LINEAR, False),
    "linear layers, 3.03 measured": (3.03, LINEAR, True),
    "linear layers, 2.43 by sizes": (2.43, LINEAR, False),
    "linear layers, 2.43 measured": (2.43, LINEAR, True),
    "all tensors, 4 each, 5 for the head": (4, EVERYTHING, False),
    "all tensors, 4.24 by sizes": (4.24, EVERYTHING, False),
    "all tensors, 4.24 measured": (4.24, EVERYTHING, True),
}


def fused(name: str) -> str:
    """Return what layers have in common that serving engines compute as one, and that get the same bits."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    return f"{parent}.{next((names[0] for names in FUSED if leaf in names), leaf)}"


def least(costs: Mapping[str, float], weights: Mapping[str, int], unit: Callable[[str], str]) -> float:
    """Return what would be left of a loss of 1 if each unit of tensors could have any number of bits, the sum being what it is.

    A bit more everywhere divides all errors by the same. So at the best each weight loses as much: the geometric mean of what a
    weight of each unit would lose at equal errors, over their mean.
    """
    totals: dict[str, tuple[float, int]] = {}
    for name, count in weights.items():
        cost, size = totals.get(unit(name), (0.0, 0))
        totals[unit(name)] = cost + costs[name], size + count
    logarithms = sum(size * math.log(cost / size) for cost, size in totals.values())
    whole = sum(weights.values())
    return math.exp(logarithms / whole) * whole / sum(costs[name] for name in weights)


def measured(subject: Subject, bits: float, excluded: tuple[str, ...], measures: bool) -> dict[str, Any]:
    bound: list[float] = []
    costs_of = measuring.costs

    def noting(shares: Mapping[str, float], tensors: Mapping[str, tuple[float, int]]) -> dict[str, float]:
        costs = costs_of(shares, tensors)
        weights = {name: count for name, (_, count) in tensors.items()}
        bound.extend(least(costs, weights, unit) for unit in (fused, str))
        return costs

    calibration = Calibration("self", measure=measures)
    with mock.patch.object(measuring, "costs", noting):
        stored, scores = subject.packed(calibration, codec="trellis", bits=bits, exclude=excluded, settings=SETTINGS)
    return {"bits": stored, "least": bound, **asdict(scores[0])}


def measure(result: report.Result) -> None:
    subject = Subject("", "SmolLM2-135M-Instruct", models.smollm2())
    rows = result.rows_of(WAYS, lambda way: measured(subject, *way))
    result.say(
        f"KL to the original (nats per token) on {subject.tokens:,} tokens of {models.WIKITEXT}, context 1024, with 95% confidence "
        "intervals by blocks of 256 tokens. SmolLM2-135M-Instruct (rescaled), packed by `trellis` at effort `fast` in sequence, "
        "calibrated on 16,384 tokens that the model writes itself. `by sizes`: by the sizes of tensors alone; `measured`: by each "
        "tensor's share of the packed model's divergence, where the plan that this makes is measured to lose less. `at best`: what "
        "those shares would leave of the loss of equal errors if tensors could have any number of bits: layers that engines fuse the "
        "same ones, or each its own."
    )
    result.table(
        ["", "bits per weight", "KL", "at best, fused", "at best, each", "measured"],
        [
            (
                label,
                f"{row['bits']:.3f}",
                pages.divergence(row),
                *([f"{share:.2f}" for share in row["least"]] or ["", ""]),
                row["measured"],
            )
            for label, row in rows.items()
        ],
    )


if __name__ == "__main__":
    report.run("allocation", "Bits spread over tensors", measure)
