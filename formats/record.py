"""The record of a folder: which files seedpack wrote into it, and their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

from seedpack._version import WRITER
from seedpack.errors import DigestError, FormatError, VersionError
from seedpack.formats.files import is_file, is_inside, read_text
from seedpack.formats.header import dumps_canonical, loads_strict
from seedpack.formats.version import FORMAT_VERSION

RECORD_FILE = "seedpack.json"
NO_FILES: Mapping[str, str] = {}
_KEYS = {"seedpack", "writer", "files", "digest"}


def write_record(folder: Path, others: Mapping[str, str] = NO_FILES) -> None:
    """Write the record of all files that are in a folder, and of others by their digests."""
    files = {name: file_digest(folder / name) for name in _names(folder)} | dict(others)
    document = {"seedpack": FORMAT_VERSION, "writer": WRITER, "files": files}
    (folder / RECORD_FILE).write_text(dumps_canonical({**document, "digest": _digest(document)}), "utf-8")


def read_record(folder: Path) -> dict[str, str] | None:
    """Return {file: SHA-256} of a folder's record, or None where it has none (transformers has saved it again).

    Raises:
        FormatError: the record breaks its rules.
        DigestError: its bytes changed.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    text = read_text(path)
    document = loads_strict(text, str(path))
    if not isinstance(document, dict) or document.keys() != _KEYS or not isinstance(document["files"], dict):
        raise FormatError(f"{path}: must be an object of {', '.join(sorted(_KEYS))}; fetch the folder again")
    version = document["seedpack"]
    if type(version) is int and version > FORMAT_VERSION:
        raise VersionError(f"{path}: version {version}, this seedpack reads up to {FORMAT_VERSION}; upgrade seedpack")
    if text != dumps_canonical(document) or document["digest"] != _digest(document):
        raise DigestError(f"{path}: its bytes changed since it was written; fetch the folder again")
    for name, digest in document["files"].items():
        if not isinstance(digest, str) or not is_inside(name):
            raise FormatError(
                f"{path}: 'files' must map names of files in the folder to digests, got {name[:80]!r}; fetch the folder again"
            )
    return document["files"]


def verify_record(folder: Path, without: Container[str] = ()) -> Iterator[tuple[str, FormatError | None]]:
    """Check a folder's record, and the files in it against their digests, yielding (file, error or None) as it goes.

    Args:
        folder: one that may have a record.
        without: names of files that have digests of their own.
    """
    try:
        record = read_record(folder)
    except FormatError as error:
        yield RECORD_FILE, error
        return
    for name, digest in (record or {}).items():
        if name in without:
            continue
        path = folder / name
        if not is_file(path):
            yield name, FormatError(f"{path}: is missing; fetch the folder again")
        elif file_digest(path) != digest:
            remedy = "fetch it again, unless you changed it yourself"
            yield name, DigestError(f"{path}: its bytes changed since they were written; {remedy}")
        else:
            yield name, None


def foreign_files(folder: Path) -> str:
    """Return what a folder holds that seedpack did not write, or that was changed since, for a message; "" for nothing."""
    names = _names(folder)
    if not names:
        return ""
    try:
        record = read_record(folder)
    except FormatError as error:
        return f"its record of what seedpack wrote cannot be read ({error})"
    if record is None:
        return f"holds {len(names)} files, such as {names[0]!r}, and no record that seedpack wrote them ({RECORD_FILE})"
    if others := [name for name in names if name not in record]:
        return f"holds {len(others)} files that seedpack did not write, such as {others[0]!r}"
    if changed := [name for name in names if file_digest(folder / name) != record[name]]:
        return f"holds {len(changed)} files that were changed since seedpack wrote them, such as {changed[0]!r}"
    return ""


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(document: dict[str, object]) -> str:
    body = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(dumps_canonical(body).encode()).hexdigest()


def _names(folder: Path) -> list[str]:
    """Return the relative names of all that is in a folder and is no folder itself, but the record."""
    names = (
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    return sorted(name for name in names if name != RECORD_FILE)
