"""Read small files of a folder, whatever their names and bytes."""

from __future__ import annotations

from pathlib import Path

from seedpack.errors import FormatError
from seedpack.formats.header import MAX_HEADER_BYTES, loads_strict


def is_file(path: Path) -> bool:
    """Return whether a file is there; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_inside(name: str) -> bool:
    """Return whether a relative name, with / between folders, leads to a place in the folder itself."""
    return all(piece not in ("", ".", "..") and "\0" not in piece for piece in name.split("/"))


def read_text(path: Path) -> str:
    """Read a text file of a checkpoint folder, of at most the size that a header may have."""
    try:
        if (size := path.stat().st_size) > MAX_HEADER_BYTES:
            raise FormatError(f"{path}: has {size} bytes, at most {MAX_HEADER_BYTES} allowed")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 (byte {error.start})") from None


def read_json(path: Path) -> object:
    """Read a JSON file of a checkpoint folder, refusing duplicate keys and NaN."""
    return loads_strict(read_text(path), str(path))
