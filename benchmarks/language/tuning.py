"""Measure what tuning brings, and by steps of how many tokens at which rate, on texts that nothing else is scored on."""

from __future__ import annotations

import shutil
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

BITS, OWN, CONTEXT = 2, 16384, 128
TOKENS = 8192  # of each text that is scored
TEXTS = ("WikiText-2", "Python's manual")
# By label: tokens of a step, the rate, whether layers are tuned first, and the seed of the text.
WAYS: dict[str, tuple[int, float, bool, int] | None] = {
    "not tuned": None,
    "1,024 tokens, rate 0.001": (1024, 1e-3, True, 0),
    "512 tokens, rate 0.001": (512, 1e-3, True, 0),
    "256 tokens, rate 0.001": (256, 1e-3, True, 0),
    "256 tokens, rate 0.002": (256, 2e-3, True, 0),
    "256 tokens, rate 0.004": (256, 4e-3, True, 0),
    "256 tokens, rate 0.002, the whole model alone": (256, 2e-3, False, 0),
    "256 tokens, rate 0.002, on another text": (256, 2e-3, True, 1),
}


class Tuned(Subject):
    """A language model that is packed once, and tuned in many ways."""

    def __init__(self) -> None:
        text = models.wikitext()
        scored = [text[len(text) // 2 :], "\n\n".join(topics.topics.values())]
        super().__init__("", "SmolLM2-135M-Instruct", models.smollm2(), TOKENS, scored)
        self.work = models.CACHE / "tuning"

    def own(self, seed: int) -> Tensor:
        return generate_tokens(load_language_model(self.folder)[0], OWN, CONTEXT, seed).clone()

    def dense(self) -> Path:
        """Return a folder of the packed model's decoded weights."""
        folder = self.work / "dense"
        if not folder.is_dir():
            shutil.rmtree(self.work, ignore_errors=True)
            self.packed(
                Calibration(self.own(0)), codec="trellis", bits=BITS, exclude=["*embed*"], settings={"effort": "fast"}
            )
            seedpack.unpack(self.work / "packed", folder)
        return folder

    def measured(self, way: tuple[int, float, bool, int] | None) -> dict[str, Any]:
        model = load_language_model(self.dense())[0].float()
        if way is not None:
            tokens_at_once, rate, layers_first, seed = way
            layers = decoder_layers(model)
            modules = dict(model.named_modules())
            inside = [
                f"{name}.weight"
                for name, module in modules.items()
                if isinstance(module, nn.Linear) and name.startswith(tuple(f"{layer}." for layer in layers))
            ]
            values = [name for name, parameter in model.named_parameters() if parameter.dim() == 1]
            student = tuning.Student(model, list(layers), dict(zip(inside, inside, strict=True)), values)
            changes: dict[str, Any] = {"TOKENS_AT_ONCE": tokens_at_once, "RATE": rate}
            if not layers_first:
                changes["tune_layers"] = lambda student, teacher, learner, tokens, progress: learner.keep(len(layers))
            with mock.patch.multiple(tuning, **changes):
                found = tuning.tune(student, load_language_model(self.folder)[0].float(), self.own(seed))
            with torch.no_grad():
                for name, factor in found.factors.items():
                    model.get_parameter(name).mul_(factor[:, None])
                for name, value in found.values.items():
                    model.get_parameter(name).copy_(value)
        return {"texts": {name: asdict(score) for name, score in zip(TEXTS, self.scored(model), strict=True)}}


def measure(result: report.Result) -> None:
    subject = Tuned()
    rows = result.rows_of(WAYS, subject.measured)
    result.say(
        f"KL to the original (nats per token) on {TOKENS:,} tokens each of the second half of {models.WIKITEXT} and of Python's manual, context "
        f"1024, with 95% confidence intervals by blocks of 256 tokens. SmolLM2-135M-Instruct (rescaled), linear layers by `trellis` at "
        f"{BITS} bits, effort `fast`, packed in sequence on {OWN:,} tokens that the model writes, and tuned on them for one pass: the tokens of a "
        f"step, and the rate. As it is: {tuning.TOKENS_AT_ONCE} tokens, rate {tuning.RATE}."
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
