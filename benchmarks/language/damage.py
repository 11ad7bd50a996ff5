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
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import seedpack
from benchmarks.lib import models, report
from benchmarks.lib.models import CACHE
from seedpack.codecs.base import Codec
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.mask import MaskCodec
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.registry import codec_ids
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.stack import StackCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.errors import SeedpackError
from seedpack.formats import Checkpoint, SafetensorsFile
from seedpack.image.codec import HEAD, FieldCodec, head_bytes
from seedpack.loader.verify import verify
from tests.helpers.bombs import blank_image, parts_of, write_blank_image, write_tensors

HERE = CACHE / "damage"
PLACES, STEP, PAIRS, LOADS = 600, 32, 20, 15
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


def flips(path: Path, places: Iterable[int], read: Callable[[], Any]) -> str:
    """Flip bits of a file, one at a time, and return how many of them are refused by an error that names the file or its folder."""
    found = count = 0
    with path.open("r+b", buffering=0) as file:
        for place in places:
            (byte,) = os.pread(file.fileno(), 1, place // 8)
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place // 8)
            said = outcome(read)
            os.pwrite(file.fileno(), bytes([byte]), place // 8)
            count += 1
            found += said.startswith("refused") and path.parent.name in said
            if not said.startswith("refused"):
                print(f"{path}: bit {place % 8} of byte {place // 8}: {said}", file=sys.stderr)
    return f"{found:,} of {count:,}"


def places(path: Path, step: int) -> tuple[range, list[int]]:
    """Return every bit of a file's header, and a random bit of every so many bytes behind it."""
    file = SafetensorsFile(path)
    file.close()
    first = file.header.data_start
    chance = random.Random(0)
    return range(8 * first), [8 * byte + chance.randrange(8) for byte in range(first, file.size, step)]


def whole_files() -> dict[str, Path]:
    """Write a file of some 100 kB for each codec: a weight, and a raw tensor."""
    seedlm, square = SeedLMCodec(), (440, 440)
    weights: dict[str, tuple[Codec, tuple[int, int]]] = {
        "basis": (BasisCodec(count=24_000), (256, 256)),
        "field": (FieldCodec(sizes=(head_bytes(3) + 25_000, *(25_000,) * 3)), (256, 768)),
        "mask": (MaskCodec(0.5), (880, 880)),
        "raw": (RawCodec("F32"), (160, 150)),
        "seedlm": (seedlm, square),
        "stack": (StackCodec.over(seedlm, 110, 110), (16, 110 * 110)),
        "svd": (SVDCodec(rank=96), (256, 256)),
        "trellis": (TrellisCodec(4), square),
    }
    assert weights.keys() == set(codec_ids())
    parts = {id: parts_of(codec, shape) for id, (codec, shape) in weights.items()}
    for stream in parts["field"].values():
        stream.zero_()
    parts["field"]["weight"][head_bytes(3) - HEAD.size :][:8, 0, 0] = torch.tensor([0, 0, 128, 63] * 2)  # steps of 1
    extra: tuple[Codec, tuple[int, ...], Any] = (RawCodec("F32"), (7,), {"weight": torch.ones(7)})
    HERE.mkdir(parents=True, exist_ok=True)
    return {
        id: write_tensors(HERE / f"{id}.safetensors", {"w.weight": (codec, shape, parts[id]), "bias": extra})
        for id, (codec, shape) in weights.items()
    }


def verify_all(path: Path) -> None:
    """Raise the first error that `seedpack verify` finds."""
    with Checkpoint(path) as checkpoint:
        for result in verify(checkpoint):
            if result.error is not None:
                raise result.error


def flips_of_codecs() -> list[tuple[str, ...]]:
    """Flip bits of a whole file of each codec: (codec, bytes, of the header and of the data refused by verify and by load)."""
    rows = []
    for id, path in whole_files().items():
        ways = (partial(verify_all, path), partial(seedpack.load, path, dense=True))
        assert {outcome(read) for read in ways} == {"done"}, f"{id}: {outcome(ways[1])}"
        header, data = places(path, STEP)
        cells = [
            flips(path, bits, read) for read, skip in zip(ways, (1, 7), strict=True) for bits in (header[::skip], data)
        ]
        rows.append((id, f"{path.stat().st_size:,}", *cells))
        print(rows[-1], flush=True)
        path.unlink()
    return rows


def flips_of_folder(folder: Path) -> list[tuple[str, str, str]]:
    """Flip bits of a packed folder: (what reads, file, refused)."""
    weights, chance = folder / "model.safetensors", random.Random(0)
    ways: tuple[tuple[str, Callable[[Path], Any]], ...] = (
        ("seedpack verify", verify_all),
        ("seedpack.load", seedpack.load),
        ("transformers' from_pretrained", from_pretrained),
    )
    assert all(outcome(lambda read=read: read(folder)) == "done" for _, read in ways)  # type: ignore[misc]
    some = chance.sample(range(8 * weights.stat().st_size), PLACES)
    rows = [(label, weights.name, flips(weights, some, lambda read=read: read(folder))) for label, read in ways]  # type: ignore[misc]
    for name in ("config.json", "generation_config.json", "seedpack.json"):
        bits = range(0, 8 * (folder / name).stat().st_size, 29)
        rows.append(("seedpack verify", name, flips(folder / name, bits, lambda: verify_all(folder))))
    return rows


def seconds_to_load(path: Path) -> dict[str, list[float]]:
    """Return times to load with digests and without, in turn."""
    times: dict[str, list[float]] = {"1": [], "0": []}
    for _ in range(LOADS):
        for switch, found in times.items():
            os.environ["SEEDPACK_VERIFY"] = switch
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


def flipped_bits(result: report.Result, folder: Path) -> None:
    result.say(
        f"## Flipped bits\n\nA file of each codec with a raw tensor beside it: every bit of its header (for load every seventh), and "
        f"a random bit of every {STEP} bytes behind it, one at a time. Refused means an error of seedpack's that names the file or its folder. No byte of a file is "
        "padding that nothing covers: the header's bytes are canonical (M5), and a digest covers all bytes of each part (M12)."
    )
    columns = ["codec", "bytes", "verify, header", "verify, data", "load, header", "load, data"]
    result.table(columns, flips_of_codecs())
    result.say(
        f"The packed Llama: {PLACES:,} random bits of its weight file, header and data, and every 29th bit of the files "
        "beside it, which its record covers. Loading reads no record: of `config.json` it checks the manifest alone."
    )
    result.table(["what reads", "file", "refused"], flips_of_folder(folder))


def measure(result: report.Result) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folders = build()
    result.say(
        "## Tensors left out\n\nA small Llama and a small Mixtral; each tensor of their files is left out in turn, and the folder "
        "read. Refused means one error of seedpack's that names what is missing."
    )
    result.table(["what reads", "tensors left out", "refused"], left_out(folders))

    flipped_bits(result, folders["llama-packed"])
    times = seconds_to_load(models.packed_smollm2("trellis", 4))
    with_digests, plain = (statistics.median(times[switch]) for switch in ("1", "0"))
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
