"""A language model packed by each codec: perplexity and divergence beside what a user would pick instead."""

from __future__ import annotations

import shutil

import models
import peers
import report
import torch

import seedpack
from seedpack.eval.language import LanguageReport, compare_language_models, load_language_model, windows

CONTEXT, TOKENS = 1024, 16384
PACKED = [("seedlm", 4.0), ("seedlm", 3.0), ("svd", 4.0), ("svd+seedlm", 4.0)]


def measure(result: report.Result) -> None:
    folder = models.smollm2()
    name, text = models.text()
    model, tokenizer = load_language_model(folder)
    ids = windows(tokenizer, text, CONTEXT, TOKENS)
    rows = []
    for codec, bits in PACKED:
        out = models.CACHE / f"language-{codec}-{bits:.0f}"
        shutil.rmtree(out, ignore_errors=True)
        packed = seedpack.compress(folder, out, codec=codec, bits=bits)
        other, _ = load_language_model(out)
        found = compare_language_models(model, other, ids)
        rows.append(row(f"{codec}", packed.plan.totals()["bits_per_packed_weight"], packed.error_db, found))
        print(rows[-1], flush=True)
        del other
    for label, quantise in {
        "NF4, double quantisation (bitsandbytes' grid)": lambda w: peers.nf4(w),
        "round to nearest, min/max, g64": lambda w: peers.rtn(w, 4, 64),
        "round to nearest, min/max, g64 (3 bits)": lambda w: peers.rtn(w, 3, 64),
    }.items():
        other, _ = load_language_model(folder)
        error = energy = stored = weights = 0.0
        with torch.no_grad():
            for module in {m for m in other.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))} - {
                other.lm_head
            }:
                rounded, bits = quantise(module.weight)
                error += float((rounded - module.weight).double().square().sum())
                energy += float(module.weight.double().square().sum())
                stored, weights = stored + bits * rounded.numel(), weights + rounded.numel()
                module.weight.copy_(rounded)
        rows.append(
            row(
                label,
                stored / weights,
                10 * torch.tensor(error / energy).log10().item(),
                compare_language_models(model, other, ids),
            )
        )
        print(rows[-1], flush=True)
    first = found
    result.say(
        f"SmolLM2-135M-Instruct in float32, all linear layers and the (tied) embedding, on {name}: {first.tokens:,} tokens "
        f"scored, context {first.context}, windows without overlap; perplexity unpacked {first.perplexity_original:.3f}. "
        "The model is the shipped one (Q4_1 in a GGUF file) with fixed random factors moved between neighbouring channels, "
        "which leaves its function as it is and takes the old grid away (`benchmarks/models.py`). Peers are their rounding "
        "grids, not their kernels. No calibration data anywhere."
    )
    result.table(["method", "bits a weight", "relative error", "perplexity", "KL mean", "KL p99", "top-1"], rows)


def row(label: str, bits: float, db: float, found: LanguageReport) -> tuple[object, ...]:
    return (
        label, f"{bits:.3f}", f"{db:.2f} dB", f"{found.perplexity_packed:,.2f}", f"{found.kl_mean:.4f}",
        f"{found.kl_p99:.3f}", f"{100 * found.top1_agreement:.1f}%",
    )  # fmt: skip


if __name__ == "__main__":
    report.run("language", "A language model, packed", measure)
