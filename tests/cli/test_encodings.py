"""Terminals and pipes without UTF-8: every command prints, and its exit code is right."""

from __future__ import annotations

import io
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import seedpack
from seedpack.cli.main import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": torch.randn(64, 64), "größe→.weight": torch.randn(8, 8)}, "net.pt")
    seedpack.compress("net.pt", "packed", codec="svd", settings={"rank": 2})
    Path("bad.safetensors").write_bytes(b"\0" * 20)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    show = warnings.showwarning
    yield
    warnings.showwarning = show
    for number, handler in handlers.items():
        signal.signal(number, handler)


COMMANDS: dict[str, tuple[int, list[str]]] = {
    "compress": (0, ["compress", "net.pt", "-o", "out→.safetensors", "--codec", "seedlm"]),
    "dry run": (0, ["compress", "net.pt", "--dry-run"]),
    "inspect": (0, ["inspect", "packed"]),
    "verify": (0, ["verify", "packed"]),
    "compare": (0, ["compare", "net.pt", "packed"]),
    "load": (0, ["load", "packed"]),
    "help": (0, ["compress", "--help"]),
    "failure": (1, ["inspect", "bad.safetensors"]),
    "no such path": (1, ["inspect", "größe→.safetensors"]),
    "wrong usage": (2, ["inspekt→"]),
}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("command", COMMANDS)
def test_prints(command: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, arguments = COMMANDS[command]
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["seedpack", *arguments])
    code: object = 0
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code
    for stream in streams.values():
        stream.flush()
    printed = {name: stream.buffer.getvalue().decode(encoding) for name, stream in streams.items()}
    monkeypatch.undo()
    assert (code or 0) == expected, printed
    assert printed["stdout" if not expected else "stderr"]
    if command == "compress":
        assert "kB" in printed["stdout"] and ("->" in printed["stdout"] or encoding == "utf-8")
        assert encoding == "ascii" or "×" in printed["stdout"]
