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
    return [sys.executable, "-m", "seedpack", "-q", "compress", str(models.smollm2()), "-o", "packed", *options]


def one_thread() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def shards(folder: Path) -> None:
    begun = [
        subprocess.Popen(command("--shard", f"{n}/2"), cwd=folder, env=one_thread(), stdout=subprocess.DEVNULL)
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
    ways: dict[str, Callable[[Path], None]] = {
        "one thread": lambda folder: packed(folder, threads=1),
        "one process, two threads": lambda folder: packed(folder),
        "`--jobs 2`": lambda folder: packed(folder, "--jobs", "2"),
        "`--shard 1/2`, `2/2`, then `merge`": shards,
        "`--engine ray`, two workers": lambda folder: packed(folder, "--engine", "ray", "--address", cluster.address),
    }

    def measured(name: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as place:
            started = time.perf_counter()
            ways[name](Path(place))
            return {"seconds": time.perf_counter() - started, "digest": digest(Path(place) / "packed")}

    try:
        found = {name: report.kept("scale", name, lambda name=name: measured(name)) for name in ways}  # type: ignore[misc]
    finally:
        cluster.shutdown()
    first = found["one thread"]
    result.say(
        "SmolLM2-135M in float32 (135 million weights) by `seedpack compress` without options: the whole command, imports included, "
        "one run of each."
    )
    rows = [
        (
            name,
            f"{row['seconds']:.1f}",
            f"{first['seconds'] / row['seconds']:.2f}×",
            "yes" if row["digest"] == first["digest"] else "NO",
        )
        for name, row in found.items()
    ]
    result.table(["by", "seconds", "against one thread", "the same bytes"], rows)
    alone, beside = fitting_seconds(1), fitting_seconds(2)
    result.say(
        f"The limit: two processes of one thread that have nothing in common, each fitting the same matrix, take {beside / alone:.2f} "
        f"times as long as one alone, as both cores share what is below them. So two workers can be {2 * alone / beside:.2f} times as "
        "fast as one thread at most."
    )


FIT = """
import sys, time, torch
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.threads import use_threads
use_threads(1)
weight, codec = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)), TrellisCodec(code_bits=4)
codec.encode(weight[:64])
print("ready", flush=True)
sys.stdin.readline()
started = time.perf_counter()
for _ in range(3):
    codec.encode(weight)
print(time.perf_counter() - started)
"""


def fitting_seconds(count: int) -> float:
    """The mean seconds that each of so many processes takes to fit a matrix at the same time."""
    begun = [
        subprocess.Popen([sys.executable, "-c", FIT], env=one_thread(), stdin=-1, stdout=-1, text=True)
        for _ in range(count)
    ]
    for process in begun:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in begun:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in begun) / count


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
                f"fit a share at `default`, {cores} cores a machine",
                f"{WEIGHTS / MACHINES / (rate * cores) / 3600:.1f} hours",
            )
            for cores in (8, 32, 128)
        ),
        (
            "fit a share in 30 minutes",
            f"a GPU that fits {WEIGHTS / MACHINES / 1800 / 1e6:.1f} million weights/s ({WEIGHTS / MACHINES / 1800 / rate:.0f} cores' worth)",
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
