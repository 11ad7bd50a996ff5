"""Hugging Face folders in remote storage: small files are fetched, weights are read where they lie."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path, PurePosixPath
from typing import Any

from seedpack.errors import ModelError
from seedpack.formats.places import reaching
from seedpack.formats.writer import INDEX_FILE
from seedpack.hf.folder import FolderSource, beside_weights, sentence_modules


def open_remote(path: Path) -> FolderSource:
    """Open a folder in remote storage.

    Raises:
        ModelError: it has no config.json.
    """
    folder = tempfile.TemporaryDirectory(prefix="seedpack-remote-")
    try:
        _fetch(path, Path(folder.name))
        source = FolderSource(Path(folder.name), remote=path)
    except BaseException:
        folder.cleanup()
        raise
    weakref.finalize(source, folder.cleanup)
    return source


def _fetch(path: Any, folder: Path) -> None:
    """Fetch all files of a folder but its weights."""
    with reaching(path):
        top = path.path.rstrip("/") + "/"
        found = (PurePosixPath(str(name).removeprefix(top)) for name in path.fs.find(path.path))
        names = {name.as_posix(): name for name in found if not name.is_absolute() and ".." not in name.parts}
        if "config.json" not in names:
            raise ModelError(f"{path}: has no config.json; pass the weight file itself, or a Hugging Face folder")

        def fetch(name: str) -> None:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            path.fs.get_file(f"{top}{name}", str(place))

        for name in {"modules.json", INDEX_FILE} & names.keys():
            fetch(name)
        for name in beside_weights(names.values(), sentence_modules(folder)):
            if not (folder / name).exists():
                fetch(name)
