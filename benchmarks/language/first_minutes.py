"""The first minutes with seedpack: from a checkout to an answer, first signs of life, mistakes, and estimates beside runs."""

from __future__ import annotations

import os
import pty
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import seedpack
from benchmarks.lib import models, report
from benchmarks.lib.models import CACHE, ROOT
from seedpack.codecs.trellis import TrellisCodec
from seedpack.codecs.trellis_effort import EFFORTS
from seedpack.converter.estimate import WORKSPACE, bytes_to_fit
from seedpack.converter.plan import TensorPlan
from seedpack.units import duration, size

SHAPES = {
    "1B (Llama 3.2)": (1.24e9, (128256, 2048)),
    "8B (Llama 3.1)": (8.03e9, (128256, 4096)),
    "70B (Llama 3.1)": (70.6e9, (128256, 8192)),
}
BASE = 400e6  # bytes of a process that has imported torch and compiled the kernels


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "seedpack.cli", *map(str, arguments)]


def to_an_answer(result: report.Result) -> None:
    """Install a clean clone into a new environment, pack a model, and have it answer."""
    steps: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "seedpack"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        subprocess.run([sys.executable, "-m", "venv", str(clone / ".venv")], check=True)
        binaries = clone / ".venv" / "bin"
        shutil.copy(models.smollm2_gguf(), clone / "smollm2.gguf")
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(clone / "cache"), "HOME": folder}
        environment.pop("PYTHONPATH", None)
        for line in (
            "pip install -q -c constraints.txt '.[gguf]'",
            "seedpack compress smollm2.gguf -o packed",
            'seedpack run packed "What is the capital of France?" --max-new-tokens 40',
        ):
            started = time.perf_counter()
            done = subprocess.run(
                f"{binaries}/{line}", shell=True, cwd=clone, env=environment, check=True, capture_output=True, text=True
            )
            steps.append((f"`{line}`", time.perf_counter() - started))
    rows = [(line, f"{seconds:.0f}") for line, seconds in steps]
    result.say(
        "From a clean clone and a new environment to an answer, nothing compiled before (the model is a GGUF file of 98 MB), seconds:"
    )
    result.table(("", "seconds"), [*rows, ("all", f"{sum(seconds for _, seconds in steps):.0f}")])
    result.say(f"The answer: {' '.join(done.stdout.split())[:200]}")


def first_sign(arguments: Sequence[object]) -> float:
    """Return the seconds until a command shows anything on a terminal; then it is stopped."""
    started = time.perf_counter()
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, command(*arguments))
    os.read(terminal, 1)
    seconds = time.perf_counter() - started
    os.kill(child, 9)
    os.waitpid(child, 0)
    return seconds


def cpu_seconds(arguments: Sequence[object]) -> tuple[float, str]:
    """Return the CPU seconds of a command that fails, and what it says."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode in (1, 2), done
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr.strip().splitlines()[-1]


def signs_and_mistakes(result: report.Result, folder: Path) -> None:
    dense, out = models.smollm2(), folder / "out"
    gguf, file = models.smollm2_gguf(), folder / "net.pt"
    torch.save({"fc.weight": torch.randn(256, 256)}, file)
    result.say("Seconds until `seedpack compress` shows something on a terminal, medians of 5:")
    rows = [(name, f"{sorted(first_sign(['compress', model, '-o', out]) for _ in range(5))[2]:.2f}")
            for name, model in (("a Hugging Face folder", dense), ("a GGUF file", gguf), ("a state dict", file))]  # fmt: skip
    result.table(("of", "seconds"), rows)
    seedpack.compress(file, folder / "there.safetensors")
    mistakes = {
        "wrong path": ["compress", "nothing.pt", "-o", out],
        "unknown codec": ["compress", file, "-o", out, "--codec", "treliss"],
        "existing output": ["compress", file, "-o", folder / "there.safetensors"],
        "99 bits": ["compress", file, "-o", out, "--bits", "99"],
        "not packed": ["verify", file],
    }
    found = {name: min(cpu_seconds(arguments) for _ in range(3)) for name, arguments in mistakes.items()}
    result.say("Mistakes, CPU seconds until the message, the least of 3:")
    table = [(name, f"{seconds:.2f}", text.replace(f"{folder}/", "")) for name, (seconds, text) in found.items()]
    result.table(("mistake", "CPU s", "message"), table)


def estimates(result: report.Result, folder: Path) -> None:
    """Set what a run says beforehand beside what it takes."""
    rows = []
    for model, name in (
        (models.smollm2(), "SmolLM2-135M, a folder"),
        (models.smollm2_gguf(), "SmolLM2-135M, a GGUF file"),
    ):
        for effort in ("fast", "default"):
            options = ["compress", model, "-o", folder / "packed", "--force", "--effort", effort]
            script = f"import resource, sys; sys.argv[0] = 'seedpack'; from seedpack.cli.main import cli; cli.main({list(map(str, options))!r}, standalone_mode=False); print('peak', 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
            done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
            estimated = re.search(r"estimate: (.+) of fitting, (.+) of memory, (.+) of output", done.stderr)
            rate = re.search(r"([\d,]+) weights/s while fitting", done.stdout)
            peak = re.search(r"peak (\d+)", done.stdout)
            assert estimated is not None and rate is not None and peak is not None, (done.stdout, done.stderr)
            weights = sum(
                t.numel() for t in AutoModelForCausalLM.from_pretrained(models.smollm2()).parameters() if t.dim() > 1
            )
            took = duration(weights / float(rate[1].replace(",", "")))
            rows.append((name, effort, estimated[1], took, estimated[2], size(int(peak[1])), estimated[3],
                         size(sum(file.stat().st_size for file in (folder / "packed").glob("*.safetensors")))))  # fmt: skip
    result.say("What `compress` says before it begins, beside what the run then took:")
    result.table(("model", "effort", "fitting: said", "took", "memory: said", "took", "output: said", "took"), rows)


def on_the_fly(result: report.Result, folder: Path) -> None:
    """Compare what is packed while transformers loads a model with what `compress` writes."""
    config = seedpack.SeedpackConfig(bits=4, settings={"effort": "fast"})
    found = AutoModelForCausalLM.from_pretrained(models.smollm2(), quantization_config=config)
    seedpack.compress(models.smollm2(), folder / "offline", bits=4, settings={"effort": "fast"})
    expected = AutoModelForCausalLM.from_pretrained(folder / "offline")
    a, b = found.state_dict(), expected.state_dict()
    same = sum(torch.equal(a[name], b[name]) for name in b)
    result.say(
        f"`from_pretrained(…, quantization_config=SeedpackConfig(bits=4))` of SmolLM2-135M beside `compress` of the same settings: {same} of "
        f"{len(b)} tensors in memory are identical, and {len(a)} are there."
    )


def rate(effort: str, bits: int, threads: int) -> float:
    """Return the weights per second that some threads fit."""
    rows = {"fast": 1024, "default": 1024, "best": 16}[effort]
    code = (
        "import sys, time, torch\n"
        f"torch.set_num_threads({threads})\n"
        "from seedpack.codecs.trellis import TrellisCodec\n"
        f"codec, w = TrellisCodec({bits}, effort={effort!r}), torch.randn({rows}, 4096)\n"
        "codec.encode(w[:8])\n"
        "def once():\n    started = time.perf_counter()\n    codec.encode(w)\n    return time.perf_counter() - started\n"
        "print(w.numel() / min(once() for _ in range(3)))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def times(result: report.Result) -> None:
    """Extrapolate times and memory to larger models, from rates that are measured."""
    rates = {(effort, bits): (rate(effort, bits, 1), rate(effort, bits, 2)) for effort in EFFORTS for bits in (3, 4)}
    result.say("Weights fitted per second, [1024, 4096] of noise (16 rows with `best`), the best of 3:")
    result.table(
        ("effort", "bits", "1 core", "2 cores"),
        [(*key, f"{one:,.0f}", f"{two:,.0f}") for key, (one, two) in rates.items()],
    )
    rows = []
    for name, (weights, shape) in SHAPES.items():
        codec = TrellisCodec(4)
        largest = bytes_to_fit(TensorPlan("", "BF16", shape, codec, 0))
        for effort in EFFORTS:
            one, two = rates[effort, 4]
            rows.append(
                (
                    name,
                    effort,
                    duration(weights / two),
                    duration(weights / (16 * one)),
                    size(BASE + WORKSPACE + largest),
                )
            )
    result.say(
        "Extrapolated from these to whole models at 4 bits, without calibration: 2 cores by the rate of 2, 16 cores by 16 times "
        "that of one. Nothing has been timed on a GPU. Memory is the process, and what fitting the largest tensor (the embedding, in "
        "bfloat16) takes:"
    )
    result.table(("model", "effort", "2 cores", "16 cores", "memory"), rows)


def measure(result: report.Result) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        signs_and_mistakes(result, Path(name))
        estimates(result, Path(name))
        on_the_fly(result, Path(name))
    times(result)
    to_an_answer(result)


if __name__ == "__main__":
    report.run("first_minutes", "The first minutes", measure)
