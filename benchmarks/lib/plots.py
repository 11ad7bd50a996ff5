"""Plots beside the results: docs/benchmarks/NAME.png."""

from __future__ import annotations

import itertools
import math
from typing import Any

from benchmarks.lib import report

OURS = {
    "trellis": "#e59866", "trellis + self": "#c0392b", "trellis + self, budget": "#7b241c",
    "trellis + self, budget, tuned": "#641e16", "trellis + self, in sequence": "#f1948a",
    "trellis + self, everything": "#4a0e0e", "seedpack, as the command packs": "#e74c3c",
    "seedpack, everything, self+WikiText": "#4a0e0e", "seedlm": "#8e44ad", "svd": "#555555",
}  # fmt: skip


def interpolated(rows: list[dict[str, Any]], key: str, bits: float) -> float | None:
    """A family's value at some bits, linear in its logarithm between the members around; None outside."""
    rows = sorted(rows, key=lambda r: r["bits"])
    for before, after in itertools.pairwise(rows):
        if before["bits"] <= bits <= after["bits"]:
            share = (bits - before["bits"]) / max(1e-9, after["bits"] - before["bits"])
            return math.exp((1 - share) * math.log(before[key]) + share * math.log(after[key]))
    return min((r[key] for r in rows if abs(r["bits"] - bits) < 0.13), default=None)


def curves(
    result: report.Result, rows: list[dict[str, Any]], key: str, label: str, title: str, limit: tuple[float, float],
    file: str = "", across: tuple[str, str] = ("bits", "bits per weight, all that is stored"), logarithmic: str = "y",
) -> None:  # fmt: skip
    """One line a family: a value against another one (its key and its label), "x" or "y" logarithmic."""
    try:
        import matplotlib
    except ImportError:
        result.say("(no plot: matplotlib is not installed)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    markers = itertools.cycle("osv^Dd<>P*X")
    for family in sorted({r["family"] for r in rows}, key=lambda f: (f not in OURS, f)):
        members = sorted((r[across[0]], r[key]) for r in rows if r["family"] == family)
        style: dict[str, Any] = (
            {"color": OURS[family], "linewidth": 2.5} if family in OURS else {"linewidth": 1, "alpha": 0.8}
        )
        axes.plot(*zip(*members, strict=True), marker=next(markers), label=family, **style)
    axes.set(xlim=limit, xlabel=across[1], ylabel=label, title=title)
    axes.set(**{f"{axis}scale": "log" for axis in logarithmic})
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.tight_layout()
    name = f"{result.name}-{file}.png" if file else f"{result.name}.png"
    figure.savefig(report.FOLDER / name)
    pyplot.close(figure)
    result.say(f"![{title}]({name})")
