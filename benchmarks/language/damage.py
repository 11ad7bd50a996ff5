"""Damaged, incomplete and hostile files: what is refused, and what the checks cost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import seedpack
from benchmarks.lib import models, report
from benchmarks.lib.models import CACHE
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.mask import MaskCodec
from seedpack.errors import SeedpackError
from seedpack.formats import SafetensorsFile
from tests.helpers.bombs import blank_image, parts_of, write_blank_image, write_tensors

HERE = CACHE / "damage"
PLACES, PAIRS, LOADS = 300, 20, 15
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
from_pretrained = transformers.AutoModelForCausalLM.from_pretrained


def outcome(work: Callable[[], Any]) -> str:
    """Return what becomes of some work: done, refused with the message, or an error that is none of seedpack's."""
    try:
        work()
    except SeedpackError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"other: {type(error).__name__}"
    return "done"


@contextlib.contextmanager
def without(path: Path, key: str) -> Iterator[None]:
    """Take one tensor out of a file for a while; config.json stays."""
    content = path.read_bytes()
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path, {"format": "pt"})
    try:
        yield
    finally:
        path.write_bytes(content)


def build() -> dict[str, Path]:
    """Small models: dense, with experts, packed, and packed and saved again by transformers."""
    shutil.rmtree(HERE, ignore_errors=True)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(HERE / "llama")
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=4)).save_pretrained(
        HERE / "mixtral"
    )
    for name in ("llama", "mixtral"):
        seedpack.compress(HERE / name, HERE / f"{name}-packed", settings={"effort": "fast"})
        from_pretrained(HERE / f"{name}-packed").save_pretrained(HERE / f"{name}-again")
    return {folder.name: folder for folder in HERE.iterdir()}


def left_out(folders: dict[str, Path]) -> list[tuple[str, int, int]]:
    """Leave each tensor out in turn: (what reads, tensors, of those refused)."""
    ways: list[tuple[str, str, Callable[[Path], Any]]] = [
        (
            "compress of a folder",
            "{}",
            lambda path: seedpack.compress(path, HERE / "out", codec="svd", settings={"rank": 1}),
        ),
        ("load of a packed folder", "{}-packed", seedpack.load),
        ("from_pretrained of a packed folder", "{}-packed", from_pretrained),
        ("load of one saved again by transformers", "{}-again", seedpack.load),
        ("from_pretrained of one saved again", "{}-again", from_pretrained),
    ]
    rows = []
    for label, pattern, read in ways:
        said = []
        for name in ("llama", "mixtral"):
            folder = folders[pattern.format(name)]
            for key in load_file(folder / "model.safetensors"):
                with without(folder / "model.safetensors", key):
                    said.append(outcome(lambda folder=folder, read=read: read(folder)))  # type: ignore[misc]
        rows.append((label, len(said), sum(text.startswith("refused") for text in said)))
    said = []
    for layers in (1, 3):
        folder = folders["llama-packed"]
        content = (folder / "config.json").read_text()
        (folder / "config.json").write_text(json.dumps({**json.loads(content), "num_hidden_layers": layers}))
        said += [outcome(lambda folder=folder, read=read: read(folder)) for read in (seedpack.load, from_pretrained)]  # type: ignore[misc]
        (folder / "config.json").write_text(content)
    rows.append(("a layer more or less in config.json", len(said), sum(text.startswith("refused") for text in said)))
    return rows


def flips(folder: Path, read: Callable[[Path], Any]) -> int:
    """Return how many of some random bits of a folder's data are refused."""
    path = folder / "model.safetensors"
    content, refused = bytearray(path.read_bytes()), 0
    file = SafetensorsFile(path)
    file.close()
    start = file.header.data_start
    for place in random.Random(0).sample(range(8 * start, 8 * len(content)), PLACES):
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        refused += outcome(lambda: read(folder)).startswith("refused")
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    return refused


def seconds_to_load(path: Path) -> dict[str, list[float]]:
    """Return times to load with digests and without, in turn."""
    times: dict[str, list[float]] = {"1": [], "0": []}
    for _ in range(LOADS):
        for verify, found in times.items():
            os.environ["SEEDPACK_VERIFY"] = verify
            started = time.perf_counter()
            from_pretrained(path)
            found.append(time.perf_counter() - started)
    del os.environ["SEEDPACK_VERIFY"]
    return times


def races(source: Path) -> list[str]:
    """Start pairs of runs on one name, and return what became of each pair."""
    pairs = []
    for number in range(PAIRS):
        command = [
            sys.executable,
            "-m",
            "seedpack.cli",
            "compress",
            str(source),
            "-o",
            str(HERE / f"race-{number}"),
            "--effort",
            "fast",
        ]
        both = [
            subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in range(2)
        ]
        ends = []
        for run in both:
            message = run.communicate()[1]
            refused = run.returncode == 1 and ("another run is writing it" in message or "exists already" in message)
            ends.append("finished" if run.returncode == 0 else "refused" if refused else f"failed ({message[:80]})")
        whole = subprocess.run(
            [sys.executable, "-m", "seedpack.cli", "verify", str(HERE / f"race-{number}")], capture_output=True
        )
        pairs.append(" and ".join(sorted(ends)) + ("" if whole.returncode == 0 else ", output damaged"))
    return pairs


def hostile() -> list[tuple[str, ...]]:
    """Verify and load small files that stand for much, each in a process of its own: (file, bytes, CPU time and memory)."""
    HERE.mkdir(parents=True, exist_ok=True)
    basis, large = BasisCodec(count=1), (32768, 32768)
    mask, wide = MaskCodec(kept=0.02), (1024, 1024)
    files = {
        "basis of one coefficient, [32768, 32768]": write_tensors(HERE / "basis", {"w.weight": (basis, large, parts_of(basis, large))}),
        "image of 8192 × 8192, blank": write_blank_image(HERE / "image", 8192, 8192, 1),
        "ten blank images of 480 × 480": write_tensors(HERE / "ten", {
            f"i{i}": (codec, (480, 480, 3), parts) for i in range(10) for codec, _, parts in [blank_image(480, 480)]
        }, dtype="U8"),
        "mask of 1 M weights, one in 50 kept": write_tensors(HERE / "mask", {"w.weight": (mask, wide, parts_of(mask, wide))}),
    }  # fmt: skip
    rows = []
    for label, path in files.items():
        cells = [label, f"{path.stat().st_size:,}"]
        for work in ("list(verify(Checkpoint(path)))", "seedpack.load(path, dense=True)"):
            program = WORK.format(path=str(path), warm=str(HERE / "warm"), work=work)
            found = json.loads(
                subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
            )
            cells.append(f"{found['said']} in {found['seconds']:.2f} s, {found['bytes'] / 1e6:.0f} MB")
        rows.append(tuple(cells))
    return rows


WORK = """
import json, pathlib, re, time
import seedpack
from seedpack.errors import SeedpackError
from seedpack.formats import Checkpoint
from seedpack.loader.verify import verify
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
path = {warm!r}
{work}
pathlib.Path("/proc/self/clear_refs").write_text("5")
path, before, started, said = {path!r}, peak(), time.process_time(), "done"
try:
    {work}
except SeedpackError as error:
    said = type(error).__name__
print(json.dumps(dict(said=said, seconds=time.process_time() - started, bytes=peak() - before)))
"""


def measure(result: report.Result) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folders = build()
    result.say(
        "## Tensors left out\n\nA small Llama and a small Mixtral; each tensor of their files is left out in turn, and the folder "
        "read. Refused means one error of seedpack's that names what is missing."
    )
    result.table(["what reads", "tensors left out", "refused"], left_out(folders))

    result.say(f"## Flipped bits\n\n{PLACES} random bits of the data of the packed Llama, one at a time.")
    ways = (("seedpack.load(folder)", seedpack.load), ("transformers' from_pretrained", from_pretrained))
    result.table(
        ["what reads", "refused"],
        [(label, f"{flips(folders['llama-packed'], read)} of {PLACES}") for label, read in ways],
    )

    times = seconds_to_load(models.packed_smollm2("trellis", 4))
    with_digests, plain = (statistics.median(times[verify]) for verify in ("1", "0"))
    result.say(
        f"## Cost of comparing digests\n\nSmolLM2-135M at 4 bits, `from_pretrained`, median of {LOADS} loads each, in turn. "
        "Target: at most 10%. Loading maps the file and copies nothing, so SHA-256 weighs: on one core alone it takes 43 ms for "
        "these 72 MB, a tenth of the time. It is computed on all cores beside loading; before it, it costs twice as much."
    )
    result.table(
        ["with digests", "SEEDPACK_VERIFY=0", "cost"],
        [(f"{with_digests:.3f} s", f"{plain:.3f} s", f"{100 * (with_digests / plain - 1):.1f}%")],
    )

    result.say(
        "## Files that ask for too much\n\nCPU time and memory that `verify` and `load(dense=True)` add to a process that has done "
        "the same with a small file. Target for `verify` of at most 10 kB: 2 s and 100 MB."
    )
    seedpack.compress({"w.weight": torch.randn(64, 64)}, HERE / "warm", codec="svd", settings={"rank": 1})
    result.table(["file", "bytes", "verify", "load"], hostile())

    result.say(f"## Two runs on one name\n\n{PAIRS} pairs of `seedpack compress` processes, started together.")
    found = races(folders["llama"])
    result.table(["outcome", "pairs"], [(outcome, found.count(outcome)) for outcome in sorted(set(found))])
    shutil.rmtree(HERE)


if __name__ == "__main__":
    report.run("damage", "Damaged, incomplete and hostile files", measure)
