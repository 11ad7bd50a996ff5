"""Reports of what was packed and how well."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seedpack.codecs.interfaces import Rates
from seedpack.converter.plan import Plan, TensorPlan
from seedpack.units import duration, size

USUAL = 1.5  # times the error of Gaussian weights at the same bits


@dataclass(frozen=True)
class TensorReport:
    """One fitted tensor.

    Attributes:
        plan: of the tensor.
        error, energy: ‖W - Ŵ‖² and ‖W‖².
        seconds: that its fit took.
        output_error, output_energy: E‖(W - Ŵ)x‖² and E‖Wx‖² over the inputs x of its layer; 0 where they are not known.
    """

    plan: TensorPlan
    error: float
    energy: float
    seconds: float
    output_error: float = 0.0
    output_energy: float = 0.0

    @property
    def error_db(self) -> float:
        """10·log10(‖W - Ŵ‖² / ‖W‖²)."""
        return decibels(self.error, self.energy)


@dataclass(frozen=True)
class Report:
    """The result of `compress`.

    Attributes:
        path: of the output.
        plan: that was followed.
        tensors: those that were packed.
        file_bytes: of the output's weights.
        seconds: of all of the run.
        notes: on what was done to the source's tensors before.
        source: the model, as it was given.
        input_bytes: of what was given: the files, or the tensors in memory.
        calibration: the folder with what was measured, which other runs find; None for no calibration on text.
        has_workers: whether several processes fitted.
    """

    path: Path
    plan: Plan
    tensors: tuple[TensorReport, ...]
    file_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    source: str = ""
    input_bytes: int = 0
    calibration: Path | None = None
    has_workers: bool = False

    @property
    def error_db(self) -> float:
        """Relative error over all packed weights, in dB."""
        return decibels(*self._sums("error", "energy"))

    @property
    def output_error_db(self) -> float | None:
        """Relative error of the outputs of all calibrated layers, in dB; None without a calibration."""
        error, energy = self._sums("output_error", "output_energy")
        return decibels(error, energy) if energy else None

    def _sums(self, *names: str) -> tuple[float, ...]:
        return tuple(math.fsum(getattr(tensor, name) for tensor in self.tensors) for name in names)

    def summary(self) -> dict[str, str]:
        """Return the report in words, by what each line is of."""
        totals = self.plan.totals()
        lines = {"size": self._size(totals["source_bytes"]), "bits per weight": self._bits(totals)}
        if self.tensors and (shares := self.plan.raw_shares()):
            listed = ", ".join(f"{note} {share:.1%}" for note, share in list(shares.items())[:3])
            lines["left raw"] = f"{sum(shares.values()):.1%} of the weights ({listed})"
        if self.tensors:
            lines |= self._errors()
            rate = totals["packed_weights"] / self._fitting()
            each = " by each worker" if self.has_workers else ""
            lines["time"] = f"{duration(self.seconds)}, {rate:,.0f} weights/s while fitting{each}"
        if self.calibration is not None:
            found = sum(file.stat().st_size for file in self.calibration.rglob("*") if file.is_file())
            lines["calibration"] = f"{self.calibration} ({size(found)}) serves other runs; remove it when you need none"
        return lines

    def _size(self, dense: float) -> str:
        given, ratio = self.input_bytes or dense, (self.input_bytes or dense) / max(1, self.file_bytes)
        changed = f"{ratio:.2f}× smaller" if ratio >= 1 else f"{1 / ratio:.2f}× larger"
        also = f"; {size(dense)} when dense" if abs(given - dense) > 0.1 * dense else ""
        return f"{size(given)} → {size(self.file_bytes)} ({changed}{also})"

    def _bits(self, totals: dict[str, float]) -> str:
        packed = [tensor for tensor in self.plan.tensors if tensor.packed]
        heads = [
            tensor.codec.code_bits for tensor in packed if tensor.kind == "head" and hasattr(tensor.codec, "code_bits")
        ]
        head = f", the output head {min(heads)} bits" if heads else ""
        over = f"{totals['bits_per_packed_weight']:.3f} over the packed weights, " if packed else ""
        return f"{over}{totals['bits_per_weight']:.3f} over all{head} ({len(packed)} of {len(self.plan.tensors)} tensors packed)"

    def _errors(self) -> dict[str, str]:
        worst = max(self.tensors, key=lambda tensor: tensor.error_db)
        error, energy = self._sums("error", "energy")
        text = f"{_share(error, energy)} of the weights' energy{self._usual(error)}"
        text += f"; at most {_share(worst.error, worst.energy)} ({worst.plan.name})"
        if self.output_error_db is None:
            return {"error": text}
        outputs = _share(*self._sums("output_error", "output_energy"))
        return {
            "output error": f"{outputs} of the layers' output energy, which the fit minimises",
            "weight error": text,
        }

    def _usual(self, error: float) -> str:
        """Return whether an error is what the bits give on Gaussian weights, where that is known."""
        if any(not isinstance(tensor.plan.codec, Rates) for tensor in self.tensors) or self.output_error_db is not None:
            return ""
        usual = math.fsum(
            t.plan.codec.expected_error() * t.energy for t in self.tensors if isinstance(t.plan.codec, Rates)
        )
        bits = self.plan.totals()["bits_per_packed_weight"]
        return f", {'usual' if error <= USUAL * usual else 'more than usual'} for {bits:.1f} bits"

    def _fitting(self) -> float:
        return max(1e-9, math.fsum(tensor.seconds for tensor in self.tensors))

    def __str__(self) -> str:
        width = max(map(len, self.summary()))
        return "\n".join(
            [f"Packed {self.path}", *(f"  {name:{width}}  {text}" for name, text in self.summary().items())]
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return table(f"Packed {self.path}", ("", ""), list(self.summary().items()))

    def to_json(self) -> dict[str, Any]:
        """Return a document for machines."""
        return {
            "path": str(self.path),
            "source": self.source,
            "seconds": self.seconds,
            "input_bytes": self.input_bytes,
            "file_bytes": self.file_bytes,
            "error_db": self.error_db,
            "output_error_db": self.output_error_db,
            "source_notes": list(self.notes),
            **self.plan.totals(),
            "raw_shares": self.plan.raw_shares(),
            "tensors_packed": {
                t.plan.name: {
                    "codec": t.plan.codec.spec().to_json(),
                    "shape": list(t.plan.shape),
                    "bits_per_weight": t.plan.bits_per_weight,
                    "error_db": t.error_db,
                    "output_error_db": decibels(t.output_error, t.output_energy) if t.output_energy else None,
                    "seconds": t.seconds,
                }
                for t in self.tensors
            },
        }


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in HTML, for notebooks."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    head = line("th", columns) if any(columns) else ""
    body = "".join(line("td", row) for row in rows)
    return f"<table><caption>{html.escape(title)}</caption>{head}{body}</table>"


def _share(error: float, energy: float) -> str:
    """Return a relative error in words.

    >>> _share(0.0048, 1), _share(0.000031, 1), _share(0, 1)
    ('0.48%', '0.0031%', 'none')
    """
    if error == 0:
        return "none"
    return f"{100 * error / energy:.2g}%" if 0 < energy < math.inf and error < math.inf else "an unbounded share"


def decibels(error: float, energy: float) -> float:
    """Return 10·log10(error / energy); -inf for no error, inf where it has no bound.

    >>> decibels(1.0, 100.0)
    -20.0
    """
    if error == 0:
        return -math.inf
    return 10 * math.log10(error / energy) if 0 < energy < math.inf and error < math.inf else math.inf
