"""Measure what packing in sequence brings, and how far weights should be shifted, on texts that were not used to choose it."""

from __future__ import annotations

from dataclasses import asdict
from pydoc_data import topics
from typing import Any
from unittest import mock

from benchmarks.language.calibration import Subject
from benchmarks.lib import models, pages, report
from seedpack import Calibration
from seedpack.converter.calibration import sequence

TOKENS = 8192  # of each text that is scored
TEXTS = ("WikiText-2", "Python's manual")
STEP, DAMPING = sequence.STEP, sequence.DAMPING
# By label: bits, and the step and the ridge in mean diagonals, or None for no sequence.
WAYS: dict[str, tuple[int, tuple[float, float] | None]] = {
    "4 bits": (4, None),
    "4 bits, in sequence": (4, (STEP, DAMPING)),
    "3 bits": (3, None),
    "3 bits, in sequence": (3, (STEP, DAMPING)),
    "3 bits, in sequence, no shift": (3, (0.0, DAMPING)),
    "3 bits, in sequence, whole step": (3, (1.0, DAMPING)),
    "3 bits, in sequence, whole step, ridge 1/20": (3, (1.0, 0.05)),
    "3 bits, in sequence, ridge 1/4": (3, (STEP, 0.25)),
    "3 bits, in sequence, ridge 4": (3, (STEP, 4.0)),
    "2 bits": (2, None),
    "2 bits, in sequence": (2, (STEP, DAMPING)),
}


def measured(subject: Subject, bits: int, way: tuple[float, float] | None) -> dict[str, Any]:
    step, damping = way or (STEP, DAMPING)
    with mock.patch.multiple(sequence, STEP=step, DAMPING=damping):
        calibration = Calibration("self", sequential=way is not None)
        stored, scores = subject.ours("trellis", bits, calibration, settings={"effort": "fast"})
    return {"bits": stored, "texts": {name: asdict(score) for name, score in zip(TEXTS, scores, strict=True)}}


def measure(result: report.Result) -> None:
    scored = [models.unscored_wikitext(), "\n\n".join(topics.topics.values())]
    subject = Subject("", "SmolLM2-135M-Instruct", models.smollm2(), TOKENS, scored)
    rows = result.rows_of(WAYS, lambda way: measured(subject, *way))
    result.say(
        f"KL to the original (nats per token) on {TOKENS:,} tokens each of the second half of {models.WIKITEXT} and of Python's manual, context 1024, with "
        "95% confidence intervals by blocks of 256 tokens. SmolLM2-135M-Instruct (rescaled), linear layers by `trellis` at effort `fast`, "
        "calibrated on 16,384 tokens that the model writes itself. `in sequence`: each layer is shifted by "
        f"{STEP:g} of the regression of what is lost on its input, with a ridge of {DAMPING:g} times the input's mean power, unless "
        "said otherwise ([what that is](../calibration.md#in-sequence))."
    )
    result.table(
        ["", "bits per weight", *(f"KL, {text}" for text in TEXTS), "measured"],
        [
            (label, f"{row['bits']:.3f}", *(pages.divergence(row["texts"][text]) for text in TEXTS), row["measured"])
            for label, row in rows.items()
        ],
    )


if __name__ == "__main__":
    report.run("sequence", "In sequence", measure)
