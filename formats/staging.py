"""Write beside the target and rename at the end, so that the old output stays whole whatever happens."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from seedpack.errors import ModelError, OutputError
from seedpack.formats.lock import locked
from seedpack.formats.record import foreign_files, write_record

OTHER_FORMATS = {".pt", ".pth", ".th", ".bin", ".ckpt", ".gguf", ".onnx", ".pkl", ".npz", ".h5"}


def require_name(target: Path, *, is_folder: bool = False) -> None:
    """Refuse a name that says another format than the one that is written.

    Raises:
        OutputError: with a better name.
    """
    if target.suffix.lower() in OTHER_FORMATS:
        kind = "a folder" if is_folder else f"safetensors; name it {target.with_suffix('.safetensors').name}"
        raise OutputError(f"{target}: what is written is {kind}")


@contextlib.contextmanager
def staged(target: Path, *, force: bool = False, directory: bool = False) -> Iterator[Path]:
    """Yield a path beside `target` to write to; it takes the target's place if the block succeeds.

    On any exception (an interrupt too) the new output is removed and the target is left as it was. One run at a time
    writes a target; what a killed one left behind is removed by the next. A folder gets a record of its files. What is put
    into `kept_of(target)` stays for a run to come, until the output stands.

    Args:
        target: the file or folder to be made.
        force: replace an existing output, which is an `OutputError` otherwise. Of folders only those are replaced that hold
            nothing but what seedpack wrote.
        directory: make the yielded path a folder.
    """
    if target.name in ("", ".."):
        raise OutputError(f"{target}: is no name for an output; name a file or a folder in it")
    stage = stage_of(target)
    new, old = stage / "new", stage / "old"
    try:
        with locked(stage, f"{target}: another run is writing it", "name another output"):
            try:
                _clear(new, target, old)
                _require_replaceable(target, force, directory)
                if directory:
                    new.mkdir()
                yield new
                if directory:
                    write_record(new)
                _require_replaceable(target, force, directory)
                if os.path.lexists(target) and directory:
                    os.rename(target, old)
                os.replace(new, target)
                shutil.rmtree(kept_of(target), ignore_errors=True)
            finally:
                _clear(new, target, old)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}; nothing was changed") from error


def stage_of(target: Path) -> Path:
    """Return the folder beside an output in which it is made."""
    return target.parent / f".{target.name}.partial"


def kept_of(target: Path) -> Path:
    """Return the folder of what a run keeps for the next one, should it not end."""
    return stage_of(target) / "kept"


def exists_already(target: Path) -> str:
    """Return the message that refuses to replace an output unasked."""
    return f"{target}: exists already; pass --force (force=True) to replace it, or name another output"


def _require_replaceable(target: Path, force: bool, directory: bool) -> None:
    """Refuse to replace what exists: without `force` anything, with it what is not an output of the same kind."""
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputError(exists_already(target))
    if not target.is_dir():
        if directory or not (target.is_file() or target.is_symlink()):
            raise OutputError(f"{target}: not a folder, but the output is one; name another output")
        return
    if not directory:
        raise OutputError(f"{target}: is a folder, but the output is a file; name a file")
    if why := foreign_files(target):
        raise OutputError(
            f"{target}: {why}; move what you need away and remove the folder yourself, or name another output"
        )


def _clear(new: Path, target: Path, old: Path) -> None:
    """Bring back an old output whose place nothing has taken, and remove what else a run left."""
    if os.path.lexists(old) and not os.path.lexists(target):
        os.rename(old, target)
    for path in (old, new):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if os.path.lexists(path):  # it holds files that cannot be removed: out of the way of the next run
            os.rename(path, target.parent / f".{target.name}.leftover-{secrets.token_hex(4)}")


def require_apart(output: Path, source: Path) -> None:
    """Refuse an output that would take the place of its source, or of a folder that holds it."""
    target, origin = output.resolve(), source.resolve()
    if source.exists() and (target == origin or target in origin.parents):
        raise ModelError(f"{output}: is the model itself or holds it; name another output")
