"""An interrupted run goes on where it stopped, whatever stopped it."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import seedpack
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter import estimate
from seedpack.converter.journal import write_file
from seedpack.errors import ModelError, OutputError
from tests.helpers.marks import slow

NAMES = [f"{i}.weight" for i in range(6)]
OPTIONS: dict[str, Any] = {"codec": "trellis", "settings": {"effort": "fast"}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net = nn.Sequential(*(nn.Linear(64, 48 + 16 * i, bias=False) for i in range(6)))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[TrellisCodec]:
    """The codecs of tensors that are fitted, in order."""
    found: list[TrellisCodec] = []
    encode = TrellisCodec.encode

    def recorded(self: TrellisCodec, *args: Any, **more: Any) -> Any:
        found.append(self)
        return encode(self, *args, **more)

    monkeypatch.setattr(TrellisCodec, "encode", recorded)
    return found


def stop_after(count: int, error: BaseException) -> Callable[..., None]:
    """Return a function for progress that raises an error once so many tensors are fitted."""
    seen: set[str] = set()

    def progress(stage: str, done: int, total: int, unit: str = "", item: str = "", /) -> None:
        if stage == "Fitting" and item:
            seen.add(item)
            if len(seen) > count:
                raise error

    return progress


def interrupt(model: Path, output: Path, count: int, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        seedpack.compress(model, output, **OPTIONS, **options, progress=stop_after(count, KeyboardInterrupt()))
    assert not output.exists()


def whole(model: Path, **options: Any) -> bytes:
    output = model.parent / "whole.safetensors"
    seedpack.compress(model, output, **OPTIONS, **options, force=True)
    return output.read_bytes()


def test_only_what_is_left_is_fitted(model: Path, tmp_path: Path, fitted: list[TrellisCodec]) -> None:
    expected, output = whole(model), tmp_path / "out.safetensors"
    interrupt(model, output, 4)
    del fitted[:]
    messages: list[str] = []
    seedpack.compress(model, output, **OPTIONS, progress=lambda stage, *rest: messages.extend(rest[3:4]))
    assert len(fitted) == 2 and output.read_bytes() == expected
    assert "resuming: 4 of 6 tensors done" in messages
    assert sorted(os.listdir(tmp_path)) == ["net.pt", "out.safetensors", "whole.safetensors"]


def test_an_interrupt_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    stop = stop_after(2, KeyboardInterrupt())

    def progress(stage: str, done: int, total: int, unit: str = "", item: str = "", /) -> None:
        messages.append(item)
        stop(stage, done, total, unit, item)

    with pytest.raises(KeyboardInterrupt):
        seedpack.compress(model, tmp_path / "out.safetensors", **OPTIONS, progress=progress)
    assert messages[-1] == f"2 tensors kept in {tmp_path}/.out.safetensors.partial: the same command goes on from there"


def test_what_other_choices_have_in_common_is_kept(model: Path, tmp_path: Path, fitted: list[TrellisCodec]) -> None:
    output, plan = tmp_path / "out.safetensors", seedpack.plan(model, **OPTIONS).to_json()
    interrupt(model, output, 4)
    del fitted[:]
    plan["tensors"]["1.weight"]["config"]["code_bits"] = 3
    report = seedpack.compress(model, output, **OPTIONS, plan=plan)
    assert [codec.code_bits for codec in fitted] == [3, 4, 4] and len(report.tensors) == 6


@pytest.mark.parametrize("change", ["weight", "importance", "dtype"])
def test_nothing_else_is_taken(model: Path, tmp_path: Path, fitted: list[TrellisCodec], change: str) -> None:
    output = tmp_path / "out.safetensors"
    options: dict[str, Any] = {}
    interrupt(model, output, 5)
    if change == "weight":
        state = torch.load(model)
        state["1.weight"][3, 5] += 1
        torch.save(state, model)
    elif change == "importance":
        options = {"importance": {"1.weight": torch.arange(1.0, 65)}}
    else:
        options = {"dtype": "bfloat16"}
    del fitted[:]
    seedpack.compress(model, output, **OPTIONS, **options)
    assert len(fitted) == (6 if change == "dtype" else 2)
    assert output.read_bytes() == whole(model, **options)


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit", "empty"])
def test_damaged_entries_are_fitted_again(model: Path, tmp_path: Path, fitted: list[TrellisCodec], damage: str) -> None:
    expected, output = whole(model), tmp_path / "out.safetensors"
    interrupt(model, output, 3)
    entry = sorted((tmp_path / ".out.safetensors.partial" / "kept").iterdir())[0]
    data = bytearray(entry.read_bytes())
    data[-1] ^= 4
    entry.write_bytes(bytes({"truncated": data[:-3], "a flipped bit": data, "empty": b""}[damage]))
    del fitted[:]
    seedpack.compress(model, output, **OPTIONS)
    assert len(fitted) == 4 and output.read_bytes() == expected


def test_a_full_disk_loses_nothing(
    model: Path, tmp_path: Path, fitted: list[TrellisCodec], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, output = whole(model), tmp_path / "out.safetensors"
    fsync, count = os.fsync, [0]

    def full(descriptor: int) -> None:
        count[0] += 1
        if count[0] == 4:  # the values that were checked are kept too
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device; free space, and run the same command again"):
        seedpack.compress(model, output, **OPTIONS)
    monkeypatch.setattr(os, "fsync", fsync)
    del fitted[:]
    seedpack.compress(model, output, **OPTIONS)
    assert len(fitted) == 4 and output.read_bytes() == expected


@pytest.mark.parametrize("seed", slow(*range(8)))
def test_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    """Until the run that is not killed, which gives the same bytes and leaves nothing else."""
    state = {f"{i}.weight": torch.randn(256, 512) for i in range(8)}
    torch.save(state, tmp_path / "net.pt")
    expected = whole(tmp_path / "net.pt")
    (tmp_path / "whole.safetensors").unlink()
    arguments = [
        sys.executable,
        "-m",
        "seedpack",
        "-q",
        "compress",
        "net.pt",
        "-o",
        "out.safetensors",
        "--effort",
        "fast",
    ]
    generator, started = random.Random(seed), time.monotonic()
    kills = 0
    while True:
        process = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE)
        if kills < 3:
            staged = tmp_path / ".out.safetensors.partial"
            while not staged.exists() and process.poll() is None and not (tmp_path / "out.safetensors").exists():
                time.sleep(0.002)
            time.sleep(generator.random() * 0.4)
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, message = process.communicate(timeout=120)
        if process.returncode == 0 or (tmp_path / "out.safetensors").exists():
            break
        assert process.returncode == -signal.SIGKILL, message
        assert time.monotonic() - started < 120
    assert (tmp_path / "out.safetensors").read_bytes() == expected
    leftover = set(os.listdir(tmp_path)) - {"net.pt", "out.safetensors"}
    if leftover:  # killed after the output stood: a next run removes it
        assert leftover == {".out.safetensors.partial"}
        shutil.rmtree(tmp_path / ".out.safetensors.partial")


def test_what_cannot_fit_is_refused_before_any_work(
    model: Path, tmp_path: Path, fitted: list[TrellisCodec], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"takes 3\d\.\d kB of disk .* has 10\.0 kB free; free space"):
        seedpack.compress(model, tmp_path / "new" / "out.safetensors", **OPTIONS)
    monkeypatch.undo()
    monkeypatch.setattr(estimate, "free_bytes", lambda: 40_000_000)
    with pytest.raises(ModelError, match=r"fitting 5\.weight takes 40\.\d MB of memory, and 40\.0 MB are free"):
        seedpack.compress(model, tmp_path / "out.safetensors", **OPTIONS)
    assert not fitted and os.listdir(tmp_path) == ["net.pt"]


def test_a_full_disk_is_told_where_another_library_writes(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written: .*; free space, and run the same command again"):
            write_file(tmp_path / "x", lambda path: save_file({"a": torch.zeros(1 << 17)}, path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
