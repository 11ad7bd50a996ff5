"""A language model packed by each codec: perplexity and divergence beside what a user would pick instead."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import seedpack
from benchmarks.lib import models, peers, plots, report
from seedpack.eval.language import LanguageReport, compare_language_models, windows
from seedpack.hf.language_model import load_language_model

CONTEXT, TOKENS = 1024, 16384
Found = tuple[float, float, LanguageReport]  # bits per weight, relative error in dB, and what became of the model
PACKED = [("trellis", 4), ("trellis", 3), ("trellis", 2), ("trellis", 3.5), ("seedlm", 4), ("seedlm", 3), ("svd", 4)]


class Recorded:
    """A model that has been run on the windows once: gives its logits again without running.

    Where they are many, they are halves in a file, which has no name and goes with the process.
    """

    def __init__(self, model: Any, ids: Tensor, half: bool = False):
        self.device, self.ids = torch.device("cpu"), ids
        shape = (*ids.shape, model.config.get_text_config().vocab_size)
        if half:
            with TemporaryDirectory(dir=models.CACHE) as folder:
                file = str(Path(folder) / "logits")
                self.logits = torch.from_file(file, True, math.prod(shape), dtype=torch.float16).view(shape)
        else:
            self.logits = torch.empty(shape)
        with torch.inference_mode():
            for window, logits in zip(ids, self.logits, strict=True):
                logits.copy_(model(window[None]).logits[0])

    def eval(self) -> Recorded:
        return self

    def __call__(self, window: Tensor) -> Any:
        index = next(i for i, known in enumerate(self.ids) if torch.equal(known, window[0]))
        return SimpleNamespace(logits=self.logits[index, None])


def measure(result: report.Result) -> None:
    folder = models.smollm2()
    text = models.wikitext()
    model, tokenizer = load_language_model(folder)
    ids = windows(tokenizer, text, CONTEXT, TOKENS)
    original = Recorded(model, ids)
    methods: dict[str, tuple[str, Callable[[], Found]]] = {}
    for codec, bits in PACKED:
        methods[f"{codec}, {bits:g} bits"] = (codec, partial(packed, folder, codec, bits, original, ids))
    for label, (family, quantise) in peers.data_free().items():
        methods[label] = (family, partial(rounded, folder, quantise, original, ids))
    rows = [row(label, *methods[label]) for label in methods if result.wanted(label)]
    found = rows[0]
    result.say(
        f"SmolLM2-135M-Instruct in float32, all linear layers and the (tied) embedding, on {models.WIKITEXT}: {found['tokens']:,} "
        f"tokens scored, context {found['context']}, windows without overlap; perplexity unpacked "
        f"{found['perplexity_original']:.3f}. The model is the shipped one (Q4_1 in a GGUF file) with fixed random factors "
        "moved between neighbouring channels, which leaves its function as it is and takes the old grid away "
        "(`benchmarks/lib/models.py`). No calibration data anywhere. Peers are their own quantisers (their weights rebuilt "
        "and run densely), all linear layers and the embedding in one type; GGUF types are pure, over blocks of 256 of "
        "the flattened weight, without importance matrix. `trellis` rows give the output head, which is the embedding "
        f"here, one bit more; the bits per weight count it. Peers' packages: {peers.versions()}."
    )
    rows.sort(key=lambda r: r["bits"])
    result.table(
        ["method", "bits per weight", "relative error", "perplexity", "KL mean", "KL p99", "top-1"],
        [
            (r["label"], f"{r['bits']:.3f}", f"{r['error_db']:.2f} dB", f"{r['perplexity_packed']:,.2f}",
             f"{r['kl_mean']:.4f}", f"{r['kl_p99']:.3f}", f"{100 * r['top1_agreement']:.1f}%")
            for r in rows
        ],
    )  # fmt: skip
    compare(result, rows, "kl_mean", "KL")
    plots.curves(
        result, rows, "kl_mean", "KL divergence to the original (nats per token)",
        "SmolLM2-135M on WikiText-2: divergence against bits, no calibration data", limit=(2, 6),
    )  # fmt: skip


def compare(result: report.Result, rows: list[dict[str, Any]], key: str, what: str) -> None:
    """Beside each trellis row, the best that any peer has at its bits, interpolated in log(value) along its family."""
    table = []
    for ours in (r for r in rows if r["family"] == "trellis"):
        others = {
            family: value
            for family in {r["family"] for r in rows} - {"trellis", "seedlm", "svd"}
            if (value := plots.interpolated([r for r in rows if r["family"] == family], key, ours["bits"])) is not None
        }
        best = min(others, key=lambda family: others[family], default=None)
        table.append(
            (ours["label"], f"{ours['bits']:.3f}", f"{ours[key]:.4f}", "none reaches these bits" if best is None
             else f"{others[best]:.4f} ({best})")
        )  # fmt: skip
    result.say(
        f"At the same bits, the best peer (a family's values are interpolated in log {what} between its members):"
    )
    result.table(["", "bits per weight", what, "best peer"], table)


def row(label: str, family: str, run: Callable[[], Found]) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        bits, error_db, found = run()
        return {"family": family, "bits": bits, "error_db": error_db, **asdict(found)}

    return report.kept("language", label, measure)


def packed(folder: Path, codec: str, bits: float, original: Any, ids: Tensor) -> Found:
    """Packed by seedpack, loaded and run as a user would."""
    out = models.CACHE / f"language-{codec}-{bits:g}"
    shutil.rmtree(out, ignore_errors=True)
    done = seedpack.compress(folder, out, codec=codec, bits=bits)
    other, _ = load_language_model(out)
    return (
        done.plan.totals()["bits_per_packed_weight"],
        done.error_db,
        compare_language_models(original, [other], ids)[0],
    )


def rounded(folder: Path, quantise: peers.Quantiser, original: Any, ids: Tensor) -> Found:
    """Every matrix replaced by what the peer would rebuild."""
    other, _ = load_language_model(folder)
    bits, error_db = peers.replace_weights(other, quantise)
    return bits, error_db, compare_language_models(original, [other], ids)[0]


if __name__ == "__main__":
    report.run("language", "A language model, packed", measure)
