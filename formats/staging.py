"""Write beside the target and rename at the end, so that the old output stays whole whatever happens."""

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

    On any exception (an interrupt too) the new output is removed and the target is left as it was.

    Args:
        target: the file or folder to be made.
        force: replace an existing output, which is an `OutputError` otherwise.
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
    """Refuse to replace what is not an output of the same kind, even with `force`: only a model's folder is deleted."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        if directory or not (target.is_file() or target.is_symlink()):
            raise OutputError(f"{target}: not a folder, but the output is one; name another output")
        return
    if not directory:
        raise OutputError(f"{target}: is a folder, but the output is a file; name a file")
    looks_like_a_model = any((target / name).is_file() for name in ("config.json", "model.safetensors"))
    if any(target.iterdir()) and not looks_like_a_model:
        raise OutputError(f"{target}: is a folder of something other than a model; name another output")


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
    with contextlib.suppress(OSError):  # the new output is in place; the next run removes leftovers of the old
        _remove(old)


def _remove_leftovers(target: Path) -> None:
    """Remove leftovers of a killed process for this target, and bring back an output that it had moved aside."""
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
