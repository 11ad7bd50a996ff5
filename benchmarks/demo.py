"""make demo: compress a real language model, load it back, see what was gained and lost. At most 12 minutes on 2 cores."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import models
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import seedpack
from seedpack.api import Report
from seedpack.cli.output import progress, quiet_transformers, size
from seedpack.eval.language import LanguageReport, compare_language_models, load_language_model, windows

PROMPT = "The capital of France is"
CONTEXT, TOKENS = 1024, 4096
CODECS = {"seedlm": "SeedLM, 4 bits", "svd": "SVD baseline, the same bytes"}


def main() -> None:
    started = time.perf_counter()
    quiet_transformers()
    console = Console()
    folder = models.smollm2()
    console.print(f"[bold]SmolLM2-135M-Instruct[/bold] in {folder.relative_to(models.ROOT)}")
    packed = {codec: compress(folder, codec) for codec in CODECS}
    original, tokenizer = load_language_model(folder)
    name, text = models.text()
    ids = windows(tokenizer, text, CONTEXT, TOKENS)
    rows: list[tuple[str, ...]] = []
    sentences = [("original", generate(original, tokenizer))]
    for codec, report in packed.items():
        model = seedpack.load(report.path, dtype=torch.float32)
        with progress(f"Scoring {CODECS[codec]}", ids.numel(), "tokens") as advance:
            found = compare_language_models(original, model, ids, lambda count: advance("", count))
        sentences.append((CODECS[codec], generate(model, tokenizer)))
        if not rows:
            rows.append(first_row(folder, original, found))
        rows.append(row(CODECS[codec], report, model, found))
        del model
    show(console, rows, sentences, f"{name}, {found.tokens:,} tokens scored, context {CONTEXT}")
    console.print(
        f"[dim]{time.perf_counter() - started:.0f} s in all; packed models are in {models.CACHE.name}/demo-*[/dim]"
    )


def compress(folder: Path, codec: str) -> Report:
    out = models.CACHE / f"demo-{codec}"
    shutil.rmtree(out, ignore_errors=True)
    with progress(f"Fitting {CODECS[codec]}", 134_479_872, "weights") as watch:
        return seedpack.compress(folder, out, codec=codec, bits=4.0, watch=watch)


def generate(model: Any, tokenizer: Any) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0]
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())


def first_row(folder: Path, model: Any, found: LanguageReport) -> tuple[str, ...]:
    disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return (
        "original, float32",
        size(disk),
        size(model.get_memory_footprint()),
        "32",
        f"{found.perplexity_original:.2f}",
        "",
        "",
        "",
        "",
    )


def row(label: str, report: Report, model: Any, found: LanguageReport) -> tuple[str, ...]:
    fitting = sum(tensor.seconds for tensor in report.tensors)
    return (
        label, size(report.file_bytes), size(model.get_memory_footprint()),
        f"{report.plan.totals()['bits_per_packed_weight']:.3f}", f"{found.perplexity_packed:,.2f}", f"{found.kl_mean:.3f}",
        f"{100 * found.top1_agreement:.1f}%", f"{report.error_db:.2f} dB", f"{fitting:.0f} s",
    )  # fmt: skip


def show(console: Console, rows: list[tuple[str, ...]], sentences: list[tuple[str, str]], text: str) -> None:
    width = max(console.width, 118) if not console.is_terminal else console.width
    table = Table(box=box.SIMPLE_HEAD)
    for i, title in enumerate(("", "on disk", "in memory", "bits", "perplexity", "KL", "top-1", "weight error", "fit")):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    console.print(table, width=width)
    console.print(f"[dim]{text}. KL is to the original's next-token distribution, in nats. The weights are the shipped ones with "
                  "channels rescaled, so that their old 4-bit grid helps no method; the function is the same.[/dim]\n")  # fmt: skip
    for label, sentence in sentences:
        console.print(f"[bold]{label}[/bold]: {sentence}", highlight=False)
    console.print()


if __name__ == "__main__":
    main()
