"""Measure what tuning brings, and by steps of how many tokens at which rate, on texts that nothing else is scored on."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from pydoc_data import topics
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import seedpack
from benchmarks.language.calibration import Subject
from benchmarks.lib import models, pages, report
from seedpack import Calibration
from seedpack.converter.calibration import tuning
from seedpack.hf.internals import decoder_layers
from seedpack.hf.language_model import load_language_model
from seedpack.hf.own_text import generate_tokens

OWN, CONTEXT = 16384, 128
TOKENS = 8192  # of each text that is scored
TEXTS = ("WikiText-2", "Python's manual")
USUAL = tuning.TOKENS_AT_ONCE
# By label: bits, and the tokens of a step, the rate as a multiple of the usual one, and whether layers are tuned first.
WAYS: dict[str, tuple[int, tuple[int, float, bool] | None]] = {
    "4 bits, not tuned": (4, None),
    "4 bits": (4, (USUAL, 1, True)),
    "4 bits, four times the rate": (4, (USUAL, 4, True)),
    "3 bits, not tuned": (3, None),
    "3 bits": (3, (USUAL, 1, True)),
    "3 bits, twice the rate": (3, (USUAL, 2, True)),
    "2 bits, not tuned": (2, None),
    "2 bits": (2, (USUAL, 1, True)),
    "2 bits, half the rate": (2, (USUAL, 0.5, True)),
    "2 bits, twice the rate": (2, (USUAL, 2, True)),
    "2 bits, steps of 1,024 tokens": (2, (1024, 1, True)),
    "2 bits, the whole model alone": (2, (USUAL, 1, False)),
}


class Tuned(Subject):
    """A language model that is packed once for each number of bits, and tuned in many ways."""

    def __init__(self) -> None:
        scored = [models.unscored_wikitext(), "\n\n".join(topics.topics.values())]
        super().__init__("", "SmolLM2-135M-Instruct", models.smollm2(), TOKENS, scored)
        self.work = models.CACHE / "tuning"

    @functools.cached_property
    def own(self) -> Tensor:
        return generate_tokens(load_language_model(self.folder)[0], OWN, CONTEXT, 0).clone()

    @functools.cache  # noqa: B019  # one model
    def dense(self, bits: int) -> Path:
        """Return a folder of the packed model's decoded weights."""
        folder = self.work / f"dense-{bits}"
        calibration = Calibration(self.own, context=CONTEXT)
        seedpack.compress(
            self.folder, self.work / "packed", bits=bits, exclude=["*embed*"], settings={"effort": "fast"},
            calibration=calibration, force=True,
        )  # fmt: skip
        seedpack.unpack(self.work / "packed", folder, force=True)
        return folder

    def measured(self, bits: int, way: tuple[int, float, bool] | None) -> dict[str, Any]:
        model = load_language_model(self.dense(bits))[0].float()
        if way is not None:
            tokens_at_once, multiple, layers_first = way
            layers = decoder_layers(model)
            modules = dict(model.named_modules())
            inside = [
                f"{name}.weight"
                for name, module in modules.items()
                if isinstance(module, nn.Linear) and name.startswith(tuple(f"{layer}." for layer in layers))
            ]
            values = [name for name, parameter in model.named_parameters() if parameter.dim() == 1]
            student = tuning.Student(model, list(layers), dict(zip(inside, inside, strict=True)), values)
            changes: dict[str, Any] = {"TOKENS_AT_ONCE": tokens_at_once, "RATE": multiple * tuning.RATE}
            if not layers_first:
                changes["tune_layers"] = lambda student, teacher, learner, tokens, progress: learner.keep(len(layers))
            with mock.patch.multiple(tuning, **changes):
                found = tuning.tune(student, load_language_model(self.folder)[0].float(), self.own)
            with torch.no_grad():
                for name, factor in found.factors.items():
                    model.get_parameter(name).mul_(factor[:, None])
                for name, value in found.values.items():
                    model.get_parameter(name).copy_(value)
        return {"texts": {name: asdict(score) for name, score in zip(TEXTS, self.scored(model), strict=True)}}


def measure(result: report.Result) -> None:
    subject = Tuned()
    rows = result.rows_of(WAYS, lambda way: subject.measured(*way))
    result.say(
        f"KL to the original (nats per token) on {TOKENS:,} tokens each of the second half of {models.WIKITEXT} and of Python's manual, context "
        f"1024, with 95% confidence intervals by blocks of 256 tokens. SmolLM2-135M-Instruct (rescaled), linear layers by `trellis` at effort "
        f"`fast`, packed in sequence on {OWN:,} tokens that the model writes, and tuned on them for one pass: as it is, in steps of {USUAL} "
        f"tokens at a rate of {tuning.RATE:g} times the relative error of the weights, unless said otherwise."
    )
    result.table(
        ["", *(f"KL, {text}" for text in TEXTS), "measured"],
        [
            (label, *(pages.divergence(row["texts"][text]) for text in TEXTS), row["measured"])
            for label, row in rows.items()
        ],
    )


if __name__ == "__main__":
    report.run("tuning", "Tuning", measure)
