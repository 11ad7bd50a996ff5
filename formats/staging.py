"""Write beside the target, rename at the end: whatever happens, the old output stays whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from seedpack.errors import OutputError


@contextlib.contextmanager
def staged(target: Path, *, force: bool = False, directory: bool = False) -> Iterator[Path]:
    """Yield a path beside `target` to write to; it takes the target's place if the block succeeds.

    On any exception (an interrupt too) what was written is removed and the target is as it was.

    Args:
        target: the file or folder to be made.
        force: replace what exists there; else that is an `OutputError`.
        directory: make the yielded path a folder.
    """
    if os.path.lexists(target) and not force:
        raise OutputError(f"{target}: exists already; pass --force (force=True) to replace it, or name another output")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        partial = target.parent / f".{target.name}.partial-{os.getpid()}"
        if directory:
            partial.mkdir()
        try:
            yield partial
            _replace(partial, target)
        except BaseException:
            _remove(partial)
            raise
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}; nothing was changed") from error


def _replace(partial: Path, target: Path) -> None:
    if not target.is_dir() or target.is_symlink():
        if partial.is_dir() and os.path.lexists(target):
            target.unlink()
        os.replace(partial, target)
        return
    old = target.parent / f".{target.name}.replaced-{os.getpid()}"
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(old, target)
        raise
    _remove(old)


def _remove_leftovers(target: Path) -> None:
    """Remove what a killed process left behind for this target."""
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        pid = leftover.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            _remove(leftover)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
