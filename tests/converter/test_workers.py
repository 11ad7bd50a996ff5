"""Several processes fit the tensors of one run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import seedpack
from seedpack.errors import ModelError, OptionError, SeedpackError

OPTIONS: dict[str, Any] = {"codec": "trellis", "settings": {"effort": "fast"}}


def model(folder: Path, rows: int = 48) -> Path:
    state = {f"{i}.weight": torch.randn(rows + 16 * i, 256) for i in range(6)}
    torch.save({**state, "bias": torch.randn(7)}, folder / "net.pt")
    return folder / "net.pt"


def test_they_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    path, seen = model(tmp_path), list[str]()
    seedpack.compress(path, one, **OPTIONS)
    report = seedpack.compress(
        path, two, **OPTIONS, jobs=2, progress=lambda stage, *rest: seen.extend(rest[3:4] if stage == "Fitting" else [])
    )
    assert one.read_bytes() == two.read_bytes() and len(report.tensors) == 6
    assert {f"{i}.weight" for i in range(6)} <= set(seen)
    assert sorted(os.listdir(tmp_path)) == ["net.pt", "one.safetensors", "two.safetensors"]


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    """Ends in one message, and what is done is kept."""
    path, output = model(tmp_path, 4096), tmp_path / "out.safetensors"

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if list(tmp_path.glob(".out.safetensors.partial/kept/*.safetensors")):
                for process in multiprocessing.active_children():
                    os.kill(process.pid or 0, signal.SIGKILL)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(ModelError, match="a worker was killed"):
        seedpack.compress(path, output, **OPTIONS, jobs=2)
    thread.join()
    messages: list[str] = []
    seedpack.compress(path, output, **OPTIONS, progress=lambda stage, *rest: messages.extend(rest[3:4]))
    assert any(message.startswith("resuming: ") for message in messages)
    seedpack.compress(path, tmp_path / "whole.safetensors", **OPTIONS)
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_an_error_in_a_worker_is_that_of_the_run(tmp_path: Path) -> None:
    path = model(tmp_path)
    with pytest.raises(SeedpackError, match="1.weight: .*importance"):
        seedpack.compress(path, tmp_path / "out.safetensors", **OPTIONS, jobs=2, importance={"1.weight": torch.ones(3)})


def test_what_they_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="several workers each open the model, and this one is in memory"):
        seedpack.compress(torch.nn.Linear(64, 64), tmp_path / "out.safetensors", **OPTIONS, jobs=2)
    with pytest.raises(OptionError, match="jobs: expected a count of processes"):
        seedpack.compress(model(tmp_path), tmp_path / "out.safetensors", jobs=0)
