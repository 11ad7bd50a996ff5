"""More than one worker: the same model packed by one thread, two processes, two shards and two Ray workers; and what a model of 405
billion weights takes by the parts that are measured."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import models, report
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.fitting import look
from seedpack.converter.journal import write_file
from seedpack.converter.sources.open import open_source
from seedpack.converter.threads import use_threads
from seedpack.formats.digest import part_digest

WEIGHTS, MACHINES = 405e9, 64  # Llama 3.1 405B
STORAGE = 1.0  # GB/s of a shared disk or bucket, for each machine: an assumption


def command(*options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "seedpack",
        "-q",
        "compress",
        str(models.smollm2()),
        "-o",
        "packed",
        "--bits",
        "2",
        *options,
    ]


def one_thread() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def shards(folder: Path, *options: str) -> None:
    begun = [
        subprocess.Popen(
            command("--shard", f"{n}/2", *options), cwd=folder, env=one_thread(), stdout=subprocess.DEVNULL
        )
        for n in (1, 2)
    ]
    assert all(process.wait() == 0 for process in begun)
    merge = [sys.executable, "-m", "seedpack", "-q", "merge", "packed"]
    subprocess.run(merge, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def packed(folder: Path, *options: str, threads: int = 2) -> None:
    env = one_thread() if threads == 1 else os.environ.copy()
    subprocess.run(command(*options), cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)


def digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return whole.hexdigest()


def runs(result: report.Result) -> None:
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ways: dict[str, Callable[..., None]] = {
        "one thread": lambda folder, *more: packed(folder, *more, threads=1),
        "one process, two threads": packed,
        "`--jobs 2`": lambda folder, *more: packed(folder, "--jobs", "2", *more),
        "`--shard 1/2`, `2/2`, then `merge`": shards,
        "`--engine ray`, two workers": lambda folder, *more: packed(
            folder, "--engine", "ray", "--address", cluster.address, *more
        ),
    }

    def seconds_of(name: str, *options: str) -> tuple[float, str]:
        with tempfile.TemporaryDirectory() as place:
            started = time.perf_counter()
            ways[name](Path(place), *options)
            return time.perf_counter() - started, digest(Path(place) / "packed")

    def measured(name: str) -> dict[str, Any]:
        return dict(zip(("seconds", "digest"), seconds_of(name), strict=True))

    def fixed(name: str) -> dict[str, Any]:
        return {"seconds": seconds_of(name, "--include", "*layers.0.self_attn.[qk]_proj*")[0]}

    try:
        found = {name: report.kept("scale", name, lambda name=name: measured(name)) for name in ways}  # type: ignore[misc]
        few = {name: report.kept("scale", f"{name}, few", lambda name=name: fixed(name))["seconds"] for name in ways}  # type: ignore[misc]
    finally:
        cluster.shutdown()
    first = found["one thread"]
    result.say(
        "SmolLM2-135M in float32 (135 million weights) by `seedpack compress --bits 2`: the whole command, imports included, "
        "one run of each."
    )
    rows = [
        (
            name,
            f"{row['seconds']:.1f}",
            f"{first['seconds'] / row['seconds']:.2f}×",
            f"{few[name]:.1f}",
            f"{(first['seconds'] - few['one thread']) / (row['seconds'] - few[name]):.2f}×",
            "yes" if row["digest"] == first["digest"] else "NO",
        )
        for name, row in found.items()
    ]
    result.table(
        ["by", "seconds", "against one thread", "two tensors only", "the rest against one thread", "the same bytes"],
        rows,
    )
    result.say(
        "*Two tensors only* is the same command with `--include '*layers.0.self_attn.[qk]_proj*'`: what a run takes whatever the size "
        "of its model, most of it to import torch and transformers, in the workers once more. Without it, on larger models, a way is "
        "faster by the last column."
    )


def timed(work: Callable[[], object]) -> float:
    """The seconds of the fastest of three."""
    took = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        took.append(time.perf_counter() - started)
    return min(took)


def parts(result: report.Result) -> None:
    use_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(2048, 2048)
    rates = {}
    for effort in ("fast", "default"):
        codec = TrellisCodec(code_bits=4, effort=effort)
        codec.encode(weight[:64])
        rates[effort] = weight.numel() / timed(lambda codec=codec: codec.encode(weight))  # type: ignore[misc]
    block = torch.randn(64, 1 << 20).bfloat16()
    data = block.view(torch.uint8).numpy().data.cast("B")
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "block.safetensors"
        from safetensors.torch import save_file

        save_file({"w": block}, source)
        opened = open_source(source)
        read = block.nbytes / timed(lambda: look(opened.read("w"))) / 1e9
        written = block.nbytes / timed(lambda: write_file(source, lambda path: path.write_bytes(data))) / 1e9
        digested = block.nbytes / timed(lambda: part_digest("U8", (len(data),), data)) / 1e9
    result.say("The parts, on one thread:")
    result.table(
        ["part", "rate"],
        [
            (
                "read a tensor of bfloat16 from a file in the page cache, digest and check its values",
                f"{read:.2f} GB/s",
            ),
            ("write a kept tensor or a part of the output, to the disk", f"{written:.2f} GB/s"),
            ("digest", f"{digested:.2f} GB/s"),
            ("fit at 4 bits, effort `fast`", f"{rates['fast'] / 1e6:.2f} million weights/s"),
            ("fit at 4 bits, effort `default`", f"{rates['default'] / 1e6:.2f} million weights/s"),
        ],
    )
    arithmetic(result, rates["default"], read, min(written, digested))


def arithmetic(result: report.Result, rate: float, read: float, written: float) -> None:
    source, packed_bytes = 2 * WEIGHTS / 1e9, 4.02 / 8 * WEIGHTS / 1e9
    share = source / MACHINES
    reading = 2 * max(share / read, share / STORAGE)  # to check values, and to fit
    merging = packed_bytes / min(written, STORAGE) + packed_bytes / min(read, STORAGE)
    result.say(
        f"A model of {WEIGHTS / 1e9:.0f} billion weights: {source:.0f} GB of bfloat16, {packed_bytes:.0f} GB at 4 bits, on {MACHINES} "
        f"machines by `--shard i/{MACHINES}` and one that merges. Arithmetic from the rates above; storage that gives each machine "
        f"{STORAGE:.0f} GB/s is an assumption. How fast a GPU fits has not been measured, so its row says what rate would be needed."
    )
    rows: list[tuple[str, str]] = [
        ("read and check a share twice, one thread", f"{reading / 60:.1f} minutes"),
        *(
            (
                f"fit a share at `default`, {cores} cores a machine as fast as this one",
                f"{WEIGHTS / MACHINES / (rate * cores) / 60:.1f} minutes",
            )
            for cores in (2, 8, 64)
        ),
        (
            "fit a share in 10 minutes",
            f"needs a GPU that fits {WEIGHTS / MACHINES / 600 / 1e6:.1f} million weights/s ({WEIGHTS / MACHINES / 600 / rate:.0f} cores' worth)",
        ),
        ("merge: read what is kept, write and digest the output", f"{merging / 60:.0f} minutes"),
    ]
    result.table(["step", "takes"], rows)


def measure(result: report.Result) -> None:
    os.environ["PYTHONPATH"] = str(models.ROOT)
    runs(result)
    parts(result)


if __name__ == "__main__":
    report.run("scale", "More than one worker", measure)
