"""The lock of an output's folder leaves nothing behind, whenever it is interrupted, and takes nothing from its holder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from seedpack.formats.lock import HeldError, locked

CALLS = ["mkdir", "open", "flock", "stat", "fstat", "ftruncate", "write"]


def _interrupted_after(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Raise a KeyboardInterrupt as soon as a call of the operating system has done its work, the first time."""
    module = pytest.importorskip("fcntl") if name == "flock" else os
    call = getattr(module, name)

    def once(*arguments: Any, **options: Any) -> Any:
        call(*arguments, **options)
        monkeypatch.setattr(module, name, call)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, once)


@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    folder = tmp_path / "out.partial"
    _interrupted_after(monkeypatch, call)
    with pytest.raises(KeyboardInterrupt), locked(folder, "out: another run is writing it", "wait"):
        pass
    assert not os.listdir(tmp_path)
    with locked(folder, "out: another run is writing it", "wait"):
        assert folder.is_dir(), "it can be held again"
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks by `flock`")
def test_a_refused_run_leaves_the_holder_its_lock(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    with locked(folder, "out: another run is writing it", "wait"):
        for _ in range(2):
            with pytest.raises(HeldError, match="another run is writing it .process"), locked(folder, "out: another run is writing it", "wait"):  # fmt: skip
                pass
    assert not os.listdir(tmp_path)
