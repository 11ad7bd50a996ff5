from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from seedpack.kernels.common import code_cache
from seedpack.kernels.common.jit import jit

ROOT = Path(__file__).resolve().parent.parent.parent
SUMS = {
    np.float32: 6.0,
    np.float64: 6.0,
}  # of three twos: two variants of the code, so that one can be mistaken for another


def total(x: Any) -> Any:
    out = x[0]
    for i in range(1, x.shape[0]):
        out += x[i]
    return out


def compiled() -> Any:
    return jit()(total)


def sums(function: Any) -> dict[Any, float]:
    return {kind: float(function(np.full(3, 2, kind))) for kind in SUMS}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder, in a process that has not warned yet."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(code_cache, "_unsaid", threading.Lock())
    return tmp_path


def files(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.rglob(f"*.{kind}"))


def test_code_is_kept(folder: Path) -> None:
    assert sums(compiled()) == SUMS
    again = compiled()
    assert sums(again) == SUMS and sum(again.stats.cache_hits.values()) == 2


def emptied(content: bytes) -> bytes:
    return b""


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def foreign(content: bytes) -> bytes:
    return b"cno_such_module\nname\n."  # a pickle of what is not there


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", [emptied, cut, flipped, foreign])
def test_damage_is_replaced_and_said_once(folder: Path, kind: str, damage: Callable[[bytes], bytes]) -> None:
    sums(compiled())
    for path in files(folder, kind):
        path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match=f"compiled kernels could not .* {folder}.*NUMBA_CACHE_DIR") as said:
        assert sums(compiled()) == SUMS
    assert len(said) == 1
    again = compiled()
    assert sums(again) == SUMS and sum(again.stats.cache_hits.values()) == 2


def test_every_flipped_byte_is_found(folder: Path) -> None:
    compiled()(np.ones(3))
    (path,) = files(folder, "nbc")
    content = path.read_bytes()
    for at in range(0, len(content), len(content) // 40):
        path.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            code_cache._require_whole(str(path))


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.warns(RuntimeWarning, match="No space left on device") as said:
            assert sums(compiled()) == SUMS
    assert len(said) == 1 and not any(path.is_file() for path in folder.rglob("*"))


def test_variants_and_sources_are_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums(compiled())
    other = numba.njit(total)
    code_cache.keep_on_disk(other, "other")
    assert sums(other) == SUMS and not other.stats.cache_hits
    monkeypatch.setattr(code_cache, "_sources", lambda: "of a later release")
    later = compiled()
    assert sums(later) == SUMS and not later.stats.cache_hits


def test_no_folder_can_be_written(tmp_path: Path) -> None:
    """A file stands wherever Numba would make a folder, as on a read-only disk: each kernel still runs, and one warning says so."""
    (tmp_path / "kernel.py").write_text("""
import sys, warnings
import numpy as np
from numba import prange
from seedpack.kernels.common.jit import jit

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    @jit()
    def one(x):
        return x + 1
    @jit(parallel=True)
    def many(x, out):
        for i in prange(len(x)):
            out[i] = one(x[i])
    out = np.empty(3)
    many(np.arange(3.0), out)
print(out.tolist(), len(said), *(str(warning.message) for warning in said))
""")
    (tmp_path / "__pycache__").write_text("")
    (tmp_path / "cache").write_text("")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": f"{tmp_path}/cache",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment |= {"HOME": f"{tmp_path}/cache", "NUMBA_CACHE_DIR": ""}
    done = subprocess.run(
        [sys.executable, tmp_path / "kernel.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("[1.0, 2.0, 3.0] 1 compiled kernels could not be"), done.stderr
    assert f"{tmp_path}/__pycache__" in done.stdout


def test_warnings_as_errors_do_not_stop_a_kernel_from_the_cache(folder: Path) -> None:
    """Whoever turns the warning into an error gets it, and not Numba's or unpickling's."""
    sums(compiled())
    for path in files(folder, "nbi"):
        path.write_bytes(b"")
    with warnings.catch_warnings(), pytest.raises(RuntimeWarning, match="is damaged"):
        warnings.simplefilter("error")
        sums(compiled())


def test_two_processes_save_under_two_names(tmp_path: Path) -> None:
    """Numba numbers them: of two that save at once one would run the other's code."""
    names = {code_cache._File(str(tmp_path), "kernel", "stamp")._data_name(1) for _ in range(3)}
    assert len(names) == 3 and all(name.endswith("kernel.1.nbc") for name in names)
