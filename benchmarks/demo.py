"""make demo: compress a real language model, load it back, see what was gained and lost. At most 12 minutes on 2 cores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import seedpack
from benchmarks.lib import models
from seedpack.cli.output import progress, quiet_transformers, size, stages
from seedpack.converter.report import Report
from seedpack.eval.language import LanguageReport, compare_language_models, windows
from seedpack.hf.language_model import load_language_model

PROMPT = "The capital of France is"
CONTEXT, TOKENS = 1024, 4096
CODECS = {"trellis": "trellis, 4 bits", "svd": "SVD, 4 bits"}


def main() -> None:
    started = time.perf_counter()
    quiet_transformers()
    console = Console()
    folder = models.smollm2()
    console.print(f"[bold]SmolLM2-135M-Instruct[/bold], {folder.relative_to(models.ROOT)}")
    packed = {codec: compress(folder, codec) for codec in CODECS}
    original, tokenizer = load_language_model(folder)
    name, text = models.text()
    ids = windows(tokenizer, text, CONTEXT, TOKENS)
    sentences = {"original": generate(original, tokenizer)}
    columns: dict[str, list[str]] = {}
    for codec, report in packed.items():
        model = seedpack.load(report.path, dtype=torch.float32)
        with progress(f"Scoring {CODECS[codec]}", ids[:, 1:].numel(), "tokens") as advance:
            (found,) = compare_language_models(original, [model], ids, lambda count: advance("", count))
        sentences[CODECS[codec]] = generate(model, tokenizer)
        columns.setdefault("original", unpacked(folder, original, found))
        columns[CODECS[codec]] = figures(report, model, found)
        del model
    show(console, columns)
    console.print(
        f"[dim]{name}, {found.tokens:,} tokens scored, context {CONTEXT}; KL to the original's next-token distribution. The "
        "weights are the shipped ones with channels rescaled, so that their old 4-bit grid helps no method; the function is "
        "the same. The trellis gives the embedding, which is the output head too, 5 bits. SVD is the baseline "
        "(docs/benchmarks/language.md has more).[/dim]\n"
    )
    for label, sentence in sentences.items():
        console.print(f"[bold]{label}[/bold]: {sentence[:240]}", highlight=False)
    console.print(
        f"\n[dim]{time.perf_counter() - started:.0f} s in all; packed models: {models.CACHE.name}/demo-*[/dim]"
    )


def compress(folder: Path, codec: str) -> Report:
    with stages() as advance:
        out = models.CACHE / f"demo-{codec}"
        return seedpack.compress(folder, out, codec=codec, bits=4.0, force=True, progress=advance)


def generate(model: Any, tokenizer: Any) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0]
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())


ROWS = (
    "on disk",
    "in memory",
    "bits per weight",
    "weight error",
    "perplexity",
    "KL, nats",
    "top-1 agreement",
    "time to fit",
)


def unpacked(folder: Path, model: Any, found: LanguageReport) -> list[str]:
    disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return [size(disk), size(model.get_memory_footprint()), "32", "", f"{found.perplexity_original:.2f}", "", "", ""]


def figures(report: Report, model: Any, found: LanguageReport) -> list[str]:
    return [
        size(report.file_bytes),
        size(model.get_memory_footprint()),
        f"{report.plan.totals()['bits_per_packed_weight']:.3f}",
        f"{report.error_db:.2f} dB",
        f"{found.perplexity_packed:,.2f}",
        f"{found.kl_mean:.3f}",
        f"{100 * found.top1_agreement:.1f}%",
        f"{sum(tensor.seconds for tensor in report.tensors):.0f} s",
    ]


def show(console: Console, columns: dict[str, list[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for title in columns:
        table.add_column(title, justify="right")
    for i, name in enumerate(ROWS):
        table.add_row(name, *(values[i] for values in columns.values()))
    console.print(table)


if __name__ == "__main__":
    main()
