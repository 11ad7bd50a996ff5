"""Every stage of a calibrated run goes on where it was interrupted, and gives the same bytes."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import seedpack
from seedpack import Calibration
from seedpack.converter import snapshot
from seedpack.converter.calibration import tuning
from seedpack.converter.snapshot import Snapshot
from seedpack.hf import own_text
from seedpack.hf.own_text import generate_tokens
from tests.helpers.marks import slow
from tests.helpers.models import ARCHITECTURES, llama

WRITING, READING = "Writing text", "Calibrating"
LAYERS, STEPS = "Tuning layers", "Tuning"


@pytest.fixture(autouse=True)
def every_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "SECONDS", 0.0)
    monkeypatch.setattr(snapshot, "SHARE", 1e9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def files(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


class Watch:
    """Counts the calls for progress of a stage, keeps messages, and raises an interrupt at one of the calls."""

    def __init__(self, stage: str, stop: int = 0):
        self.stage, self.stop, self.calls, self.done = stage, stop, 0, 0
        self.messages: list[str] = []

    def __call__(self, stage: str, done: int, total: int, unit: str = "", item: str = "", /) -> None:
        if item and not unit:
            self.messages.append(item)
        elif stage == self.stage:
            self.calls += 1
            self.done += done
            if self.calls == self.stop:
                raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stage", "stops", "options", "message"),
    [
        (WRITING, (9, 40), {}, "198 of 256 tokens written"),  # within the second batch
        (READING, (2,), {"sequential": True}, "1 of 2 layers calibrated"),
        (LAYERS, (1, 2), {"tune": 2}, "2 of 10 layers and steps tuned"),
        (STEPS, (1, 5), {"tune": 2}, "7 of 10 layers and steps tuned"),
        *slow((STEPS, (2, 4, 7), {"tune": 2, "sequential": True}, "9 of 10 layers and steps tuned")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_goes_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    stops: tuple[int, ...],
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(tuning, "TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(own_text, "SEQUENCES_AT_ONCE", 5)
    choices: dict[str, Any] = {
        "bits": 3,
        "settings": {"effort": "fast"},
        "calibration": Calibration("self", tokens=256, context=32, **options),
    }
    whole, resumed, output = Watch(stage), Watch(stage), tmp_path / "two" / "out"
    seedpack.compress(folder, tmp_path / "one" / "out", progress=whole, **choices)
    for stop in stops:
        stopped = Watch(stage, stop)
        with pytest.raises(KeyboardInterrupt):
            seedpack.compress(folder, output, progress=stopped, **choices)
        assert stopped.messages[-1].startswith(f"calibration kept in {tmp_path / 'two' / 'seedpack-calibration'}")
    seedpack.compress(folder, output, progress=resumed, **choices)
    assert files(output) == files(tmp_path / "one" / "out")
    assert f"resuming: {message}" in resumed.messages
    assert resumed.done == (0 if stage == LAYERS else whole.done)
    assert not list(tmp_path.rglob("*.begun")) and not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("name", ["gemma3", *slow("gpt2", "mixtral", "qwen3")])
def test_text_goes_on_at_any_token(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a cache loses what is out of its window: from where it had all then."""
    monkeypatch.setattr(own_text, "SEQUENCES_AT_ONCE", 3)
    torch.manual_seed(0)
    model, file = ARCHITECTURES[name](), tmp_path / "text"
    if name == "gemma3":
        model.config.sliding_window = 8
        model = type(model)(model.config)
    whole, counts = generate_tokens(model, 160, 20, seed=3), []
    for stop in (1, 7, 18, 30):
        count, told = iter(range(1, 99)), list[int]()

        def progress(done: int, count: Any = count, stop: int = stop) -> None:
            if next(count) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generate_tokens(model, 160, 20, 3, progress, Snapshot(file))
        state = Snapshot(file)
        counts.append(state.done)
        assert torch.equal(generate_tokens(model, 160, 20, 3, told.append, state), whole) and sum(told) == 8 * 18
        file.unlink()
    assert counts == ([0, 15, 15, 69] if name == "gemma3" else [0, 18, 51, 87])


def test_only_a_whole_state_of_the_same_work_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "state"
    tensors = {"a": torch.randn(3, requires_grad=True), "b": torch.randn(4, 4)[:, 1:]}
    Snapshot(file, "work").keep(7, tensors)
    found = Snapshot(file, "work")
    assert found.done == 7 and all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)
    assert not Snapshot(file, "other work").tensors and not Snapshot().tensors
    monkeypatch.setattr(snapshot, "free_bytes", lambda: 100)
    found.keep(8, tensors)  # too much for the memory
    monkeypatch.undo()
    Snapshot(file, "work").keep(9, tensors)  # too soon: by default after some seconds
    assert Snapshot(file, "work").done == 7
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)
    assert Snapshot(file, "work").done == 0
    found.remove()
    assert not list(file.parent.iterdir())


PROGRAM = """
import signal
from seedpack.cli.main import main
from seedpack.converter import snapshot
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in its background
snapshot.SECONDS, snapshot.SHARE = 0.0, 1e9
main()
"""


@pytest.mark.parametrize(
    ("mark", "options"),
    [
        ("tokens.begun", []),
        *slow(("layer-0000.safetensors", ["--sequential"]), ("tuning.begun", ["--tune"])),
    ],
)
def test_ctrl_c_ends_a_stage_and_says_how_to_go_on(folder: Path, tmp_path: Path, mark: str, options: list[str]) -> None:
    text = ["--calibration", "self", "--calibration-tokens", "16384", "--calibration-context", "64"]
    command = [sys.executable, "-c", PROGRAM, "compress", "dense", "-o", "out", "--effort", "fast", *text, *options]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob(mark)) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130 and time.monotonic() - asked < 5, message  # under a second, on an idle machine
    assert "calibration kept in seedpack-calibration/" in message and "the same command goes on from there" in message
    assert message.endswith("Interrupted.\n") and "Traceback" not in message
