"""What calibration brings: a language model's linear layers packed with and without it, beside what a user would pick."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import gptq
import models
import peers
import plots
import report
import torch
from language import CONTEXT, TOKENS, Recorded

import seedpack
from seedpack.calibration.calibrate import Calibration, calibrated
from seedpack.eval.language import compare_language_models, load_language_model, windows
from seedpack.model.sources import open_source

ROWS = models.CACHE / "calibration-rows"
WORK = models.CACHE / "calibration"
CALIBRATION_TOKENS = 16384
IMATRIX_TYPES = ("Q2_K", "Q3_K", "Q4_K", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS")


def other_text() -> torch.Tensor:
    """Token ids of the second half of WikiText-2 validation, whose beginning is scored."""
    _, tokenizer = load_language_model(models.smollm2())
    text = models.text()[1]
    ids = tokenizer(text[len(text) // 2 :], return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    return ids[:CALIBRATION_TOKENS].view(-1, 512)  # type: ignore[no-any-return]


def manual() -> torch.Tensor:
    """Token ids of Python's manual: real text, of another kind."""
    from pydoc_data import topics

    _, tokenizer = load_language_model(models.smollm2())
    ids = tokenizer("\n\n".join(topics.topics.values()), return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    return ids[:CALIBRATION_TOKENS].view(-1, 512)  # type: ignore[no-any-return]


def measure(result: report.Result) -> None:
    folder, (name, text) = models.smollm2(), models.text()
    model, tokenizer = load_language_model(folder)
    ids = windows(tokenizer, text, CONTEXT, TOKENS)
    original = Recorded(model, ids)
    del model

    def ours(codec: str, bits: float, calibration: Any = None, **options: Any) -> Any:
        out = WORK / "packed"
        shutil.rmtree(out, ignore_errors=True)
        done = seedpack.compress(
            folder, out, codec=codec, bits=bits, exclude=["*embed*"], calibration=calibration, **options
        )
        other, _ = load_language_model(out)
        return done.plan.totals()["bits_per_packed_weight"], compare_language_models(original, other, ids)

    def rebuilt(quantise: Callable[[str, torch.Tensor], tuple[torch.Tensor, float]]) -> Any:
        other, _ = load_language_model(folder)
        stored = weights = 0.0
        for layer, module in other.named_modules():
            if isinstance(module, torch.nn.Linear) and "layers" in layer:
                weight, bits = quantise(f"{layer}.weight", module.weight.detach())
                module.weight.data.copy_(weight)
                stored, weights = stored + bits * weight.numel(), weights + weight.numel()
        return stored / weights, compare_language_models(original, other, ids)

    def with_imatrix(kind: str) -> Any:
        found = calibrated(open_source(folder), Calibration("self"), WORK / "packed", torch.device("cpu"))
        return rebuilt(lambda name, weight: peers.ggml(weight, kind, found.get(name).diagonal()))  # type: ignore[union-attr]

    def by_gptq(bits: int) -> Any:
        weights, said = gptq.quantised(folder, other_text(), bits, 64, models.CACHE / "gptq")
        return rebuilt(lambda name, weight: (weights[name], said["bits"]))

    methods: dict[str, tuple[str, Callable[[], Any]]] = {}
    for bits in (4, 3, 2):
        methods[f"trellis {bits}"] = ("trellis", lambda b=bits: ours("trellis", b))
        methods[f"trellis {bits} + self"] = ("trellis + self", lambda b=bits: ours("trellis", b, "self"))
    for bits in (4.03, 3.03, 2.03):
        methods[f"trellis {bits} + self, budget"] = (
            "trellis + self, budget", lambda b=bits: ours("trellis", b, "self")
        )  # fmt: skip
        methods[f"trellis {int(bits)} + self, in sequence"] = (
            "trellis + self, in sequence", lambda b=bits: ours("trellis", int(b), Calibration("self", sequential=True))
        )  # fmt: skip
    for bits in (4.03, 3.03, 2.03):
        methods[f"trellis {bits} + self, budget, tuned"] = (
            "trellis + self, budget, tuned", lambda b=bits: ours("trellis", b, Calibration("self", tune=1))
        )  # fmt: skip
    methods["trellis 3 + WikiText"] = ("trellis + WikiText", lambda: ours("trellis", 3, other_text()))
    methods["trellis 3 + Python's manual"] = ("trellis + Python's manual", lambda: ours("trellis", 3, manual()))
    for bits, removed in ((12.8, 20), (9.6, 40)):
        methods[f"svd, {removed}% removed"] = ("svd", lambda b=bits: ours("svd", b))
        methods[f"svd, {removed}% removed + self"] = ("svd + self", lambda b=bits: ours("svd", b, "self"))
    methods["NF4 (its arithmetic)"] = ("bitsandbytes NF4", lambda: rebuilt(lambda name, weight: peers.nf4(weight)))
    if importlib.util.find_spec("xllamacpp"):
        for kind in IMATRIX_TYPES:
            family = "GGUF i-quants, imatrix" if kind.startswith("IQ") else "GGUF K-quants, imatrix"
            methods[f"GGUF {kind}, imatrix"] = (family, lambda k=kind: with_imatrix(k))
    for bits in (4, 3, 2):
        methods[f"GPTQ {bits} bits g64, WikiText"] = ("GPTQ g64 (llm-compressor)", lambda b=bits: by_gptq(b))
    methods["seedlm 3"] = ("seedlm", lambda: ours("seedlm", 3))
    methods["seedlm 3 + self"] = ("seedlm + self", lambda: ours("seedlm", 3, "self"))
    rows = result.joined([row(label, *methods[label]) for label in methods if result.wanted(label)])

    result.say(
        f"SmolLM2-135M-Instruct (rescaled: `benchmarks/models.py`) in float32, its linear layers packed, embedding and head "
        f"as they are; {rows[0]['tokens']:,} tokens of {name}, context {rows[0]['context']}; perplexity unpacked "
        f"{rows[0]['perplexity_original']:.3f}. Calibration text: 16,384 tokens in sequences of 512; `self` is written by the "
        "model, `WikiText` is the second half of the text whose beginning is scored. GGUF types with an importance matrix "
        "from the same self-written text, over blocks of 256 of rows laid end to end. Times on all cores, text and Hessians "
        f"counted where they were not there yet. Peers' packages: {peers.versions()}."
    )
    rows.sort(key=lambda r: (r["bits"], r["kl_mean"]))
    result.table(
        ["method", "bits a weight", "perplexity", "over unpacked", "KL mean", "KL p99", "top-1", "seconds", "measured"],
        [
            (r["label"], f"{r['bits']:.3f}", f"{r['perplexity_packed']:,.2f}",
             f"{r['perplexity_packed'] - r['perplexity_original']:+,.2f}", f"{r['kl_mean']:.4f}", f"{r['kl_p99']:.3f}",
             f"{100 * r['top1_agreement']:.1f}%", f"{r['seconds']:.0f}", r["measured"])
            for r in rows
        ],
    )  # fmt: skip
    plots.curves(
        result, rows, "kl_mean", "KL divergence to the original (nats a token)",
        "SmolLM2-135M on WikiText-2, linear layers packed", limit=(1.8, 5),
    )  # fmt: skip


def row(label: str, family: str, run: Callable[[], Any]) -> dict[str, Any]:
    """One method's figures; kept, so that an interrupted run goes on where it was."""
    file = ROWS / f"{label.replace('/', '-').replace(' ', '-')}.json"
    if file.is_file() and (kept := json.loads(file.read_text()))["versions"] == models.versions():
        return kept["row"]  # type: ignore[no-any-return]
    started = time.perf_counter()
    bits, found = run()
    values = {"label": label, "family": family, "bits": bits, "seconds": time.perf_counter() - started, **asdict(found)}
    ROWS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"versions": models.versions(), "row": values}))
    print(f"{label}: {bits:.3f} bits, KL {found.kl_mean:.4f}, ppl {found.perplexity_packed:.2f}, {values['seconds']:.0f} s",
          flush=True)  # fmt: skip
    return values


if __name__ == "__main__":
    report.run("calibration", "Calibration", measure)
