"""Shared by the examples: options, a plot of how training went, a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks.lib


def options(description: str | None, output: str) -> argparse.ArgumentParser:
    """Return the options that every example on pictures has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--fashion", action="store_true", help="Fashion-MNIST instead of MNIST")
    parser.add_argument("--limit", type=int, help="train on so many pictures alone")
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


def plotted(values: Sequence[float], label: str, title: str, file: Path) -> None:
    """One line over epochs or steps, if matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=120)
    axes.plot(range(1, len(values) + 1), values, marker="o")
    axes.set(xlabel="epoch", ylabel=label, title=title)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file)
    print(f"plot: {file}")


def report(rows: dict[str, Any]) -> None:
    """Names and values, aligned."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
