"""Reports of what was packed and how well."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seedpack.converter.plan import Plan, TensorPlan


@dataclass(frozen=True)
class TensorReport:
    """One fitted tensor: ‖W - Ŵ‖² and ‖W‖² (float64), and the seconds its fit took."""

    plan: TensorPlan
    error: float
    energy: float
    seconds: float

    @property
    def error_db(self) -> float:
        """10·log10(‖W - Ŵ‖² / ‖W‖²)."""
        return decibels(self.error, self.energy)


@dataclass(frozen=True)
class Report:
    """The result of `compress`, and notes on what was done to the source's tensors before."""

    path: Path
    plan: Plan
    tensors: tuple[TensorReport, ...]
    file_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def error_db(self) -> float:
        """Relative error over all packed weights, in dB."""
        return decibels(sum(t.error for t in self.tensors), sum(t.energy for t in self.tensors))

    def to_json(self) -> dict[str, Any]:
        """Return a document for machines."""
        return {
            "path": str(self.path),
            "seconds": self.seconds,
            "file_bytes": self.file_bytes,
            "error_db": self.error_db,
            "source_notes": list(self.notes),
            **self.plan.totals(),
            "raw_shares": self.plan.raw_shares(),
            "tensors_packed": {
                t.plan.name: {
                    "codec": t.plan.codec.spec().to_json(),
                    "shape": list(t.plan.shape),
                    "bits_per_weight": t.plan.bits_per_weight,
                    "error_db": t.error_db,
                    "seconds": t.seconds,
                }
                for t in self.tensors
            },
        }


def decibels(error: float, energy: float) -> float:
    """Return 10·log10(error / energy); -inf for no error, inf where it has no bound.

    >>> decibels(1.0, 100.0)
    -20.0
    """
    if error == 0:
        return -math.inf
    return 10 * math.log10(error / energy) if 0 < energy < math.inf and error < math.inf else math.inf
