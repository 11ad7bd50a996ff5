"""Measure what calibration brings: a language model's linear layers packed with and without it, beside what a user would pick."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import seedpack
from benchmarks.language.table import CONTEXT, TOKENS, Recorded
from benchmarks.lib import gptq, models, peers, plots, report
from seedpack import Calibration, CompressOptions
from seedpack.converter.calibration.calibrate import calibrate
from seedpack.converter.calibration.store import Store
from seedpack.converter.calibration.tokens import from_text
from seedpack.converter.options import silent
from seedpack.converter.pipeline import open_run
from seedpack.eval.language import LanguageReport, compare_language_models, windows
from seedpack.hf.language_model import load_language_model

CALIBRATION_TOKENS = 16384
Found = tuple[float, list[LanguageReport]]  # bits per weight, and what became of the model, on each text
IMATRIX_TYPES = ("Q2_K", "Q3_K", "Q4_K", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS")


def self_calibrated(folder: Path, output: Path) -> Store:
    """Return what a calibration of a model on its own text keeps beside an output."""
    store = calibrate(open_run(folder, output, CompressOptions(calibration="self"), silent)).moments
    assert isinstance(store, Store)
    return store


class Subject:
    """A language model that is packed, and how it is measured."""

    def __init__(self, prefix: str, title: str, folder: Path, tokens: int = TOKENS, texts: Sequence[str] | None = None):
        self.prefix, self.title, self.folder, self.tokens = prefix, title, folder, tokens
        self.texts = [models.wikitext()] if texts is None else texts
        self.work = models.CACHE / "calibration" / folder.name

    @functools.cached_property
    def originals(self) -> list[Recorded]:
        """The model's own logits on the texts that are scored."""
        model, tokenizer = load_language_model(self.folder)
        half = model.config.vocab_size > 100_000 or self.tokens > TOKENS
        return [Recorded(model, windows(tokenizer, text, CONTEXT, self.tokens), half=half) for text in self.texts]

    def scored(self, model: Any) -> list[LanguageReport]:
        return [compare_language_models(original, [model], original.ids)[0] for original in self.originals]

    def text(self, text: str, tokens: int = CALIBRATION_TOKENS) -> torch.Tensor:
        """Return token ids of a text, as many as self-written ones unless said otherwise."""
        return from_text([text], AutoTokenizer.from_pretrained(self.folder), tokens, 512, "the text")

    def other_text(self) -> torch.Tensor:
        """The second half of WikiText-2 validation, whose beginning is scored."""
        return self.text(models.unscored_wikitext())

    def manual(self) -> torch.Tensor:
        """Python's manual: real text, of another kind."""
        from pydoc_data import topics

        return self.text("\n\n".join(topics.topics.values()))

    def ours(self, codec: str, bits: float, calibration: Any = None, **options: Any) -> Found:
        """Its linear layers packed by seedpack, loaded and run as a user would."""
        return self.packed(calibration, codec=codec, bits=bits, exclude=["*embed*"], **options)

    def packed(self, calibration: Any, **options: Any) -> Found:
        out = self.work / "packed"
        shutil.rmtree(out, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        done = seedpack.compress(self.folder, out, calibration=calibration, **options)
        return done.plan.totals()["bits_per_packed_weight"], self.scored(load_language_model(out)[0])

    def rebuilt(self, quantise: Callable[[str, torch.Tensor], tuple[torch.Tensor, float]]) -> Found:
        """Every linear layer of the decoder replaced by what a peer rebuilds."""
        other, _ = load_language_model(self.folder)
        stored = weights = 0.0
        for layer, module in other.named_modules():
            if isinstance(module, torch.nn.Linear) and "layers" in layer:
                weight, bits = quantise(f"{layer}.weight", module.weight.detach())
                module.weight.data.copy_(weight)
                stored, weights = stored + bits * weight.numel(), weights + weight.numel()
        return stored / weights, self.scored(other)

    def with_imatrix(self, kind: str) -> Found:
        store = self_calibrated(self.folder, self.work / "packed")
        return self.rebuilt(lambda name, weight: peers.ggml(weight, kind, store.get(name).diagonal()))  # type: ignore[union-attr]

    def by_gptq(self, bits: int) -> Found:
        weights, said = gptq.quantised(
            self.folder, self.other_text(), bits, 64, models.CACHE / "gptq" / self.folder.name
        )
        return self.rebuilt(lambda name, weight: (weights[name], said["bits"]))


def methods_of(subject: Subject, whole: bool) -> dict[str, tuple[str, Callable[[], Found]]]:
    """List what is measured, by label: a family, which is drawn as one line, and how."""
    ours, plain = subject.ours, functools.partial(Calibration, sequential=False)
    methods: dict[str, tuple[str, Callable[[], Found]]] = {}
    for bits in (4, 3, 2):
        methods[f"trellis {bits}"] = ("trellis", functools.partial(ours, "trellis", bits))
        methods[f"trellis {bits} + self"] = ("trellis + self", functools.partial(ours, "trellis", bits, plain("self")))
        methods[f"trellis {bits} + self, in sequence"] = (
            "trellis + self, in sequence", functools.partial(ours, "trellis", bits, Calibration("self"))
        )  # fmt: skip
    for budget in (4.03, 3.03, 2.43, 2.03) if whole else ():
        methods[f"trellis {budget} + self, budget"] = (
            "trellis + self, budget", functools.partial(ours, "trellis", budget, plain("self"))
        )  # fmt: skip
        methods[f"trellis {budget} + self, budget, tuned"] = (
            "trellis + self, budget, tuned", functools.partial(ours, "trellis", budget, plain("self", tune=1))
        )  # fmt: skip
        methods[f"trellis {budget} + self, everything"] = (
            "trellis + self, everything", functools.partial(ours, "trellis", budget, Calibration("self", tune=1))
        )  # fmt: skip
    for budget in (3.03, 2.03) if whole else ():
        methods[f"trellis {budget} + self, budget, tuned 3 times"] = (
            "trellis + self, budget, tuned 3 times", functools.partial(ours, "trellis", budget, plain("self", tune=3))
        )  # fmt: skip
    if whole:
        methods["trellis 3 + self, tuned"] = (
            "trellis + self, tuned", lambda: ours("trellis", 3, plain("self", tune=1))
        )  # fmt: skip
        methods["trellis 3 + Python's manual"] = (
            "trellis + Python's manual", lambda: ours("trellis", 3, plain(subject.manual()))
        )  # fmt: skip
    methods["trellis 3 + WikiText"] = ("trellis + WikiText", lambda: ours("trellis", 3, plain(subject.other_text())))
    for budget, removed in ((12.8, 20), (9.6, 40)) if whole else ():
        methods[f"svd, {removed}% removed"] = ("svd", functools.partial(ours, "svd", budget))
        methods[f"svd, {removed}% removed + self"] = ("svd + self", functools.partial(ours, "svd", budget, "self"))
    methods["NF4 (its arithmetic)"] = (
        "bitsandbytes NF4",
        lambda: subject.rebuilt(lambda name, weight: peers.nf4(weight)),
    )
    if importlib.util.find_spec("xllamacpp"):
        for kind in IMATRIX_TYPES:
            family = "GGUF i-quants, imatrix" if kind.startswith("IQ") else "GGUF K-quants, imatrix"
            methods[f"GGUF {kind}, imatrix"] = (family, functools.partial(subject.with_imatrix, kind))
    for bits in (4, 3, 2):
        methods[f"GPTQ {bits} bits g64, WikiText"] = (
            "GPTQ g64 (llm-compressor)",
            functools.partial(subject.by_gptq, bits),
        )
    if whole:
        methods["seedlm 3"] = ("seedlm", lambda: ours("seedlm", 3))
        methods["seedlm 3 + self"] = ("seedlm + self", lambda: ours("seedlm", 3, "self"))
    return {subject.prefix + label: method for label, method in methods.items()}


def measure(result: report.Result) -> None:
    subjects = (
        Subject("", "SmolLM2-135M-Instruct", models.smollm2()),
        Subject("Gemma 3: ", "Gemma 3 270M", models.gemma3()),
    )

    def of_subject(label: str) -> Subject:
        return max((s for s in subjects if label.startswith(s.prefix)), key=lambda s: len(s.prefix))

    methods = {subject: methods_of(subject, whole=subject is subjects[0]) for subject in subjects}
    wanted = {label: method for some in methods.values() for label, method in some.items() if result.wanted(label)}
    rows = result.joined([row(label, *method) for label, method in wanted.items()])
    result.say(
        "Linear layers of language models (rescaled: `benchmarks/lib/models.py`; in float32) packed, embedding and head as they are; "
        f"{TOKENS:,} tokens of {models.WIKITEXT}, context {CONTEXT}. Calibration text: 16,384 tokens in sequences of 512, or 128 of "
        "`self` since 2026-11-30; "
        "`self` is written by the model, `WikiText` is the second half of the text whose beginning is scored. GGUF types with "
        "an importance matrix from the same self-written text, over blocks of 256 of rows laid end to end. GPTQ is "
        "llm-compressor's, asymmetric, groups of 64, calibrated on `WikiText`: real text, as its users would give it (at 2 bits "
        "with ranges of least squared error; from minimum to maximum it is worse still). Seconds: fitting and scoring on all "
        "cores, text and Hessians where they were not there yet; of peers mostly scoring. Other work ran beside some rows. "
        f"Peers' packages: {peers.versions()}, {gptq.PACKAGE.replace('==', ' ')}."
    )
    for subject in subjects:
        mine = [r for r in rows if of_subject(r["label"]) is subject]  # those of peers that are not at hand now too
        if not mine:
            continue
        result.say(f"## {subject.title}\nPerplexity unpacked {mine[0]['perplexity_original']:.3f}.")
        shown(result, mine, subject.prefix)
        plots.curves(
            result, mine, "kl_mean", "KL divergence to the original (nats per token)",
            f"{subject.title} on WikiText-2, linear layers packed", (1.8, 5), subject.folder.name.removesuffix("-rescaled"),
        )  # fmt: skip


def shown(result: report.Result, rows: list[dict[str, Any]], prefix: str) -> None:
    rows.sort(key=lambda r: (r["bits"], r["kl_mean"]))
    result.table(
        ["method", "bits per weight", "perplexity", "over unpacked", "KL mean", "KL p99", "top-1", "seconds", "measured"],
        [
            (r["label"].removeprefix(prefix), f"{r['bits']:.3f}", f"{r['perplexity_packed']:,.2f}",
             f"{r['perplexity_packed'] - r['perplexity_original']:+,.2f}", f"{r['kl_mean']:.4f}", f"{r['kl_p99']:.3f}",
             f"{100 * r['top1_agreement']:.1f}%", f"{r['seconds']:.0f}", r["measured"])
            for r in rows
        ],
    )  # fmt: skip


def row(label: str, family: str, run: Callable[[], Found]) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        bits, found = run()
        return {"family": family, "bits": bits, "seconds": time.perf_counter() - started, **asdict(found[0])}

    return report.kept("calibration", label, measure)


if __name__ == "__main__":
    report.run("calibration", "Calibration", measure)
