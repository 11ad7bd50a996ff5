"""The first success of a new user, by the commands of the README; and the page that `seedpack report` writes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.language.table import CONTEXT, TOKENS
from benchmarks.lib import browser, models, report
from seedpack.eval.language import compare_language_models, windows
from seedpack.hf.language_model import load_language_model
from seedpack.units import size

TORCH = "pip install torch==2.13.0"  # on PyPI's stand-in for the CPU index
LOADED = "onload = () => setTimeout(() => document.title = performance.timing.loadEventEnd - performance.timing.navigationStart)"


def commands() -> list[str]:
    """Return the commands of the README up to the first answer of a model, with the torch of machines without a GPU."""
    readme = (models.ROOT / "README.md").read_text("utf-8")
    found = re.findall(r"^    ((?:pip|seedpack) .*)$", readme, flags=re.MULTILINE)
    return [TORCH, *found[: 1 + next(i for i, line in enumerate(found) if line.startswith("seedpack run"))]]


def longer(result: report.Result) -> None:
    """Measure the command without options beside what it may leave out."""
    rows = []
    for options in ([], ["--effort", "fast"], ["--calibration", "none"], ["--effort", "fast", "--calibration", "none"]):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            command = [
                sys.executable,
                "-m",
                "seedpack",
                "compress",
                str(models.smollm2()),
                "-o",
                f"{folder}/packed",
                *options,
            ]
            subprocess.run(command, capture_output=True, check=True)
            took = time.perf_counter() - begin
            (found,) = language_reports(models.smollm2(), [Path(folder) / "packed"])
        rows.append(
            [
                " ".join(["seedpack compress MODEL", *options]),
                f"{took:.0f}",
                f"{found.perplexity_packed:.2f}",
                f"{found.kl_mean:.4f}",
            ]
        )
        print(rows[-1], flush=True)
    result.say(
        "SmolLM2-135M by the command with its defaults (4 bits, calibrated, all tensors) and with less work; perplexity and KL "
        f"divergence on {models.text()[0]}, 16,384 tokens, unpacked {found.perplexity_original:.2f} (target: 360 s, KL 0.06):"
    )
    result.table(["command", "seconds", "perplexity", "KL"], rows)


def language_reports(original: Path, packed: list[Path]) -> list[Any]:
    """Return the reports of packed models on the text of the other pages."""
    model, tokenizer = load_language_model(original)
    ids = windows(tokenizer, models.text()[1], CONTEXT, TOKENS)
    return compare_language_models(model, [load_language_model(path)[0] for path in packed], ids)


def first_success(result: report.Result) -> None:
    """Follow the README in a new environment; a folder on the disk stands for the model of the hub."""
    model = models.smollm2()
    rows, answer = [], ""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
        (Path(folder) / "HuggingFaceTB").mkdir()
        (Path(folder) / "HuggingFaceTB/SmolLM2-135M-Instruct").symlink_to(model)
        environment = {
            **os.environ,
            "PATH": f"{folder}/venv/bin:{os.environ['PATH']}",
            "NUMBA_CACHE_DIR": f"{folder}/numba",
        }
        environment.pop("PYTHONPATH", None)
        for line in commands():
            words = shlex.split(line.replace("pip install .", f"pip install {shlex.quote(str(models.ROOT))}"))
            begin = time.perf_counter()
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=True)
            rows.append([f"`{line}`", f"{time.perf_counter() - begin:.0f}"])
            answer = done.stdout.strip()
    rows.append(["together", f"{sum(int(row[1]) for row in rows)}"])
    result.say(
        "From nothing to an answer of a packed model, by the README's commands in a new environment with no compiled kernel; the "
        f"model lies on the disk, and packages come from a mirror. {len(rows) - 1} commands (target: 5, and 300 s):"
    )
    result.table(["command", "seconds"], rows)
    result.say(f"The model's answer begins: {answer.partition('. ')[0].rstrip('.') + '.'!r}")


def page(result: report.Result) -> None:
    """Write the page of SmolLM2-135M and open it."""
    from seedpack.page.page import write_page

    packed = models.packed_smollm2("trellis", 4)
    with tempfile.TemporaryDirectory() as folder:
        output, text = Path(folder) / "report.html", Path(folder) / "text.txt"
        text.write_text(models.text()[1], "utf-8")
        begin = time.perf_counter()
        write_page(packed, output, models.smollm2(), text=text)
        took = time.perf_counter() - begin
        opened = [browser.shown(output, LOADED) for _ in range(3)] if browser.CHROMIUM else []
        nbytes = output.stat().st_size
    result.say(
        "The page that `seedpack report` writes of SmolLM2-135M at 4 bits, beside the original and on 4,096 tokens:"
    )
    result.table(
        ["what", "measured", "target"],
        [
            ["size", size(nbytes), "≤ 5 MB"],
            ["milliseconds until Chromium has loaded it, median of 3", sorted(int(t) for t, _ in opened)[1] if opened else "–", "≤ 2000"],
            ["lines on its console", max(len(lines) for _, lines in opened) if opened else "–", "0"],
            ["seconds to write it", f"{took:.0f}", ""],
        ],
    )  # fmt: skip


def measure(result: report.Result) -> None:
    first_success(result)
    longer(result)
    page(result)


if __name__ == "__main__":
    report.run("new_user", "A new user", measure)
