"""Kill `seedpack compress` at random moments, go on with the same command, and compare the bytes with an uninterrupted run's."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import report

CONFIG = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
TEXT = ["--calibration", "self", "--calibration-tokens", "2048", "--calibration-context", "64"]
KINDS: dict[str, tuple[int, list[str]]] = {  # runs that are killed, and the options
    "one job": (25, []),
    "two jobs": (25, ["--jobs", "2"]),
    "calibrated, one job": (25, TEXT),
    "calibrated, two jobs": (25, [*TEXT, "--jobs", "2"]),
    "calibrated in sequence": (5, [*TEXT, "--sequential"]),
    "calibrated and tuned": (5, [*TEXT, "--tune"]),
    "budget, in sequence, tuned": (5, [*TEXT, "--bits", "3.4", "--sequential", "--tune"]),
}
SOON = "from seedpack.converter import snapshot; snapshot.SECONDS = 0.2; from seedpack.cli.main import main; main()"


def digest(folder: Path) -> str:
    """Return the digest of all files of a folder, with their names."""
    whole = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return whole.hexdigest()


def command(options: list[str]) -> list[str]:
    return [sys.executable, "-c", SOON, "-q", "compress", "model", "-o", "packed", "--effort", "fast", *options]


def killed(folder: Path, options: list[str], after: float) -> bool:
    """Run and kill the process group after so many seconds; return whether it was still at work."""
    process = subprocess.Popen(
        command(options), cwd=folder, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)  # its workers end by themselves
        process.wait()
        return True
    return False


def remove(folder: Path) -> None:
    """Remove all that a run leaves, but the model."""
    for path in folder.iterdir():
        if path.name != "model":
            shutil.rmtree(path)


def uninterrupted(folder: Path, options: list[str]) -> tuple[float, str]:
    """The seconds of a run, and the digest of its output."""
    started = time.perf_counter()
    subprocess.run(command(options), cwd=folder, check=True, stdout=subprocess.DEVNULL)
    seconds, found = time.perf_counter() - started, digest(folder / "packed")
    remove(folder)
    return seconds, found


def kill(folder: Path, runs: int, options: list[str], generator: random.Random) -> dict[str, Any]:
    """Kill so many runs, and go on with each."""
    expected = uninterrupted(folder, options)[1]  # which compiles what is not compiled yet
    whole, again = uninterrupted(folder, options)
    assert again == expected
    same = clean = 0
    for count in range(runs):
        while not killed(folder, options, generator.uniform(0.05, 0.9) * whole) or (folder / "packed").exists():
            remove(folder)  # it had ended, or had only to close
        subprocess.run(command(options), cwd=folder, check=True, stdout=subprocess.DEVNULL)
        same += digest(folder / "packed") == expected
        clean += not {path.name for path in folder.iterdir()} - {"model", "packed", "seedpack-calibration"}
        remove(folder)
        print(f"{count + 1} of {runs} kills, {same} the same", file=sys.stderr, flush=True)
    return {"seconds": whole, "same": same, "clean": clean}


def measure(result: report.Result) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    generator, rows = random.Random(0), []
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder / "model")  # type: ignore[arg-type]
        for name, (runs, options) in KINDS.items():
            if not result.wanted(name):
                continue
            row = report.kept("resume", name, lambda runs=runs, options=options: kill(folder, runs, options, generator))  # type: ignore[misc]
            whole, same, clean = row["seconds"], row["same"], row["clean"]
            rows.append((name, f"{whole:.1f}", runs, f"{same} of {runs}", f"{clean} of {runs}"))
    result.say(
        "A small Llama (4 layers, 3 million weights) is packed by `seedpack compress`, which is killed (SIGKILL) at a random moment "
        "and started again with the same command. Its folder is compared with that of an uninterrupted run. The state "
        "of long work is kept every 0.2 s here, in place of every 5."
    )
    result.table(["run", "seconds, uninterrupted", "kills", "byte-identical", "nothing else left"], rows)


if __name__ == "__main__":
    report.run("resume", "Killed at any moment", measure)
