"""Write beside the target, rename at the end: whatever happens, the old output stays whole."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from seedpack.errors import ModelError, OutputError


@contextlib.contextmanager
def staged(target: Path, *, force: bool = False, directory: bool = False) -> Iterator[Path]:
    """Yield a path beside `target` to write to; it takes the target's place if the block succeeds.

    On any exception (an interrupt too) what was written is removed and the target is as it was.

    Args:
        target: the file or folder to be made.
        force: replace what exists there; else that is an `OutputError`.
        directory: make the yielded path a folder.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        if os.path.lexists(target) and not force:
            raise OutputError(
                f"{target}: exists already; pass --force (force=True) to replace it, or name another output"
            )
        _require_replaceable(target, directory)
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


def _require_replaceable(target: Path, directory: bool) -> None:
    """Even with `force`, no folder is deleted that a model folder does not take the place of."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        if directory or not (target.is_file() or target.is_symlink()):
            raise OutputError(f"{target}: is no folder, the output is one; name another output")
        return
    if not directory:
        raise OutputError(f"{target}: is a folder, the output is a file; name a file")
    looks_like_a_model = any((target / name).is_file() for name in ("config.json", "model.safetensors"))
    if any(target.iterdir()) and not looks_like_a_model:
        raise OutputError(f"{target}: is a folder that holds something else than a model; name another output")


def _replace(partial: Path, target: Path) -> None:
    if partial.is_file() and not target.is_dir():
        os.replace(partial, target)
        return
    old = target.parent / f".{target.name}.replaced-{os.getpid()}"
    try:
        if os.path.lexists(target):
            os.rename(target, old)
        os.rename(partial, target)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(target):
            os.rename(old, target)
        raise
    with contextlib.suppress(OSError):  # the new output is in place; what is left of the old goes with the next run
        _remove(old)


def _remove_leftovers(target: Path) -> None:
    """Remove what a killed process left behind for this target; bring back an output it had moved aside."""
    for kind in ("replaced", "partial"):
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"):
            pid = leftover.name.rpartition("-")[2]
            if pid.isdigit() and not _alive(int(pid)):
                if kind == "replaced" and not os.path.lexists(target):
                    os.rename(leftover, target)
                else:
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


def require_apart(output: Path, source: Path) -> None:
    """Refuse an output that would take the place of its source, or of a folder that holds it."""
    target, origin = output.resolve(), source.resolve()
    if source.exists() and (target == origin or target in origin.parents):
        raise ModelError(f"{output}: is the model itself or holds it; name another output")
