"""The strongest quantisers beside ours: linear layers of language models at the same bits, on two kinds of text."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.language.calibration import Found, Subject
from benchmarks.lib import autoround, exl3, ik_llama, models, pages, peers, plots, report
from seedpack import Calibration, CompressOptions
from seedpack.converter.calibration.calibrate import calibrate
from seedpack.converter.calibration.store import Store
from seedpack.converter.options import silent
from seedpack.converter.pipeline import open_run
from seedpack.eval.language import LanguageReport

TOKENS = 32768  # of each text
REAL_TOKENS = 65536  # that peers are calibrated on
TEXTS = ("WikiText-2", "Python code")
COMMAND = "seedpack, as the command packs"


def code() -> str:
    """Return modules of Python's own library, in the order of their names."""
    files = sorted(path for path in Path(functools.__file__).parent.glob("*.py") if path.stat().st_size > 20_000)
    return "\n\n".join(path.read_text("utf-8", errors="replace") for path in files)


class Contest(Subject):
    """A model, scored on both texts."""

    def __init__(self, prefix: str, title: str, folder: Path):
        super().__init__(prefix, title, folder, TOKENS, [models.wikitext(), code()])
        self.other_seconds = 0.0  # of the processor, that no method is charged with

    @contextmanager
    def uncharged(self) -> Iterator[None]:
        started = time.process_time()
        yield
        self.other_seconds += time.process_time() - started

    def scored(self, model: Any) -> list[LanguageReport]:
        with self.uncharged():
            return super().scored(model)

    def real_text(self) -> torch.Tensor:
        return self.text(models.unscored_wikitext(), REAL_TOKENS)

    @functools.cached_property
    def moments(self) -> Store:
        """Second moments of the layers' inputs on real text, kept in the cache."""
        output = models.CACHE / "peers" / self.folder.name / "packed"
        found = calibrate(open_run(self.folder, output, CompressOptions(calibration=self.real_text()), silent)).moments
        assert isinstance(found, Store)
        return found

    def moment(self, name: str) -> torch.Tensor:
        with self.uncharged():
            found = self.moments.get(name)
        assert found is not None
        return found

    def with_everything(self, bits: float) -> Found:
        """Bits spread by measured KL, twice the text, half of it real, and tuned."""
        file = self.work / "wikitext.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(models.unscored_wikitext())
        return self.ours("trellis", bits, Calibration(f"self+{file}", tokens=TOKENS, tune=1))

    def by_ik_llama(self, kind: str) -> Found:
        return self.rebuilt(lambda name, weight: ik_llama.trellis(weight, kind, self.moment(name).diagonal()))

    def by_exl3(self, bits: int) -> Found:
        return self.rebuilt(lambda name, weight: exl3.exl3(weight, self.moment(name), bits))

    def by_mix(self, mix: str, layers: int) -> Found:
        def quantise(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, float]:
            return peers.ggml(weight, peers.mixed(name, mix, layers), self.moment(name).diagonal())

        return self.rebuilt(quantise)

    def by_autoround(self, bits: int) -> Found:
        weights, stored = autoround.quantised(self.folder, self.real_text(), bits)
        return self.rebuilt(lambda name, weight: (weights[name], stored))

    def plainly(self, quantise: peers.Quantiser) -> Found:
        return self.rebuilt(lambda name, weight: quantise(weight))


def methods_of(subject: Contest, layers: int) -> dict[str, tuple[str, Callable[[], Found]]]:
    """List what is measured, by label: a family, which is drawn as one line, and how."""
    methods: dict[str, tuple[str, Callable[[], Found]]] = {}

    def add(label: str, family: str, run: Callable[[], Found]) -> None:
        methods[subject.prefix + label] = family, run

    for bits in (4, 3, 2):
        add(
            f"seedpack {bits}",
            COMMAND,
            functools.partial(subject.ours, "trellis", bits, Calibration("self")),
        )
        add(
            f"seedpack {bits}, everything, self+WikiText",
            "seedpack, everything, self+WikiText",
            functools.partial(subject.with_everything, bits + 0.03),
        )
        add(f"EXL3 {bits}, WikiText", "EXL3, WikiText", functools.partial(subject.by_exl3, bits))
        add(f"HIGGS {bits}", "HIGGS", functools.partial(subject.plainly, functools.partial(peers.higgs, bits=bits)))
        if autoround.at_hand():
            add(f"AutoRound {bits} g64", "AutoRound g64", functools.partial(subject.by_autoround, bits))
        if importlib.util.find_spec("hqq"):
            add(
                f"HQQ {bits} g64",
                "HQQ g64",
                functools.partial(subject.plainly, functools.partial(peers.hqq, bits=bits)),
            )
        if importlib.util.find_spec("sinq"):
            add(
                f"SINQ {bits} g64",
                "SINQ g64",
                functools.partial(subject.plainly, functools.partial(peers.sinq, bits=bits)),
            )
    if ik_llama.at_hand():
        for kind in ik_llama.TYPES:
            add(f"ik_llama.cpp {kind}, imatrix", "ik_llama.cpp IQ*_KT", functools.partial(subject.by_ik_llama, kind))
    if importlib.util.find_spec("xllamacpp"):
        for mix in peers.MIXES:
            add(f"llama.cpp {mix}, imatrix", "llama.cpp mixes", functools.partial(subject.by_mix, mix, layers))
    nf4 = peers.bitsandbytes_nf4 if importlib.util.find_spec("bitsandbytes") else peers.nf4
    add("bitsandbytes NF4", "bitsandbytes NF4", functools.partial(subject.plainly, nf4))
    if importlib.util.find_spec("torchao"):
        add("torchao int4 g64", "torchao int4 g64", functools.partial(subject.plainly, peers.torchao_int4))
    return methods


def row(subject: Contest, label: str, family: str, run: Callable[[], Found]) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        started = time.process_time() - subject.other_seconds
        bits, found = run()
        scores = {text: asdict(report) for text, report in zip(TEXTS, found, strict=True)}
        return {
            "family": family,
            "bits": bits,
            "cpu_seconds": time.process_time() - subject.other_seconds - started,
            "texts": scores,
            "packages": peers.versions(),
        }

    return report.kept("peers", label, measure)


def measure(result: report.Result) -> None:
    subjects = {
        Contest("", "SmolLM2-135M-Instruct", models.smollm2()): 30,
        Contest("Gemma 3: ", "Gemma 3 270M", models.gemma3()): 18,
    }
    wanted = {
        label: (subject, label, *method)
        for subject, layers in subjects.items()
        for label, method in methods_of(subject, layers).items()
        if result.wanted(label)
    }
    rows = result.joined([row(*method) for method in wanted.values()])
    packages = sorted({package for r in rows for package in r["packages"].split(", ")})
    built = f", ik_llama.cpp {ik_llama.version()}" if ik_llama.at_hand() else ""
    result.say(
        "Linear layers of language models (rescaled: `benchmarks/lib/models.py`; in float32), embedding and head as they are; "
        f"{TOKENS:,} tokens each of {models.WIKITEXT} and of the modules of Python's library, context 1024, with 95% "
        "confidence intervals by blocks of 256 tokens. All stored bits of these layers are counted. `seedpack` has the command's defaults: calibrated "
        f"in sequence on 16,384 tokens that the model writes itself; `everything, self+WikiText`: on {TOKENS:,} tokens, half of them WikiText-2's, bits spread by measured KL, tuned for a pass. CPU seconds are those of quantising, without reading a real text. `WikiText` and `imatrix`: calibrated on "
        f"{REAL_TOKENS:,} tokens of the second half of the text whose beginning is scored, which favours them on that text."
    )
    result.say(
        "EXL3's quantiser needs CUDA; its algorithm is written again (`benchmarks/lib/exl3.py`), with blocks of 64 where layers are no "
        "multiples of 128. ik_llama.cpp's and llama.cpp's quantisers are their own, over blocks of 256 of rows laid end to end "
        "where they would take larger types; AutoRound with "
        f"{autoround.ITERATIONS} iterations, on the same text; HIGGS with transformers' grids, in blocks that divide the rows. "
        f"Packages: {', '.join(packages)}{built}."
    )
    for subject in subjects:
        other = [s.prefix for s in subjects if s is not subject and s.prefix]
        mine = [r for r in rows if r["label"].startswith(subject.prefix) and not r["label"].startswith(tuple(other))]
        if mine:
            result.say(f"## {subject.title}")
            shown(result, mine, subject.prefix)
            result.say(" ".join(better(mine, subject.prefix)))
            for text in TEXTS:
                drawn = [{**r, "kl": r["texts"][text]["kl_mean"]} for r in mine]
                plots.curves(
                    result, drawn, "kl", "KL divergence to the original (nats per token)", f"{subject.title} on {text}",
                    (1.8, 5), f"{subject.folder.name.removesuffix('-rescaled')}-{text.split('-')[0].split()[0].lower()}",
                )  # fmt: skip


def shown(result: report.Result, rows: list[dict[str, Any]], prefix: str) -> None:
    def score(found: dict[str, Any]) -> tuple[str, str]:
        return pages.divergence(found), f"{100 * found['top1_agreement']:.1f}%"

    rows.sort(key=lambda r: (r["bits"], r["texts"][TEXTS[0]]["kl_mean"]))
    heads = [f"{what}, {text}" for text in TEXTS for what in ("KL", "top-1")]
    result.table(
        ["method", "bits per weight", *heads, "CPU seconds", "measured"],
        [
            (r["label"].removeprefix(prefix), f"{r['bits']:.3f}", *(cell for text in TEXTS for cell in score(r["texts"][text])),
             f"{r['cpu_seconds']:.0f}", r["measured"])
            for r in rows
        ],
    )  # fmt: skip


def better(rows: list[dict[str, Any]], prefix: str) -> list[str]:
    """Say which peers of at most a tenth of a bit more lose less than what the command packs, on each text."""
    sentences = []
    for ours in (r for r in rows if r["family"] == COMMAND):
        for peer in (r for r in rows if "seedpack" not in r["family"] and r["bits"] < ours["bits"] + 0.1):
            names = [r["label"].removeprefix(prefix) for r in (peer, ours)]
            for text in TEXTS:
                theirs, mine = peer["texts"][text], ours["texts"][text]
                if theirs["kl_mean"] < mine["kl_mean"]:
                    doubt = ", within the intervals" if theirs["kl_interval"][1] > mine["kl_interval"][0] else ""
                    sentences.append(f"On {text} {names[0]} loses less than {names[1]}{doubt}.")
    return sentences or ["No peer of at most a tenth of a bit more loses less than what the command packs."]


if __name__ == "__main__":
    report.run("peers", "The strongest peers", measure)
