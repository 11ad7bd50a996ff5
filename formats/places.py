"""Paths, and the addresses of remote storage (s3://, gs://, hf://, https://), which behave like paths: fsspec's, by universal_pathlib."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seedpack.errors import BackendError, FormatError, SeedpackError, first_line

ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")
LOCAL = ("file", "local")
PIECE, AT_ONCE = 1 << 25, 8  # bytes of a range request, and requests at once
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def is_remote(place: str | Path) -> bool:
    """Return whether a text or a path is the address of remote storage.

    >>> is_remote("s3://models/llama"), is_remote("models/llama"), is_remote("file:///models/llama")
    (True, False, False)
    """
    found = ADDRESS.match(str(place))
    return found is not None and found[1].lower() not in LOCAL


def place(name: str | Path) -> Path:
    """Return a path, or what behaves like one for an address.

    Raises:
        FormatError: no storage has addresses of this form.
        BackendError: packages are missing.
    """
    if not isinstance(name, str):
        return name
    scheme = name.partition("://")[0].lower()
    if not is_remote(name):
        return Path(name.partition("://")[2] if scheme in LOCAL else name)
    try:
        from upath import UPath

        found: Any = UPath(name)
        _ = found.fs
    except ImportError:
        needed = " ".join(filter(None, ["'seedpack-torch[remote]'", PACKAGES.get(scheme, "")]))
        raise BackendError(f"{name}: {scheme}:// needs packages that are not installed; pip install {needed}") from None
    except ValueError as error:
        raise FormatError(f"{name}: {first_line(error)}; known are file paths, s3://, gs://, hf://, https://") from None
    return found  # type: ignore[no-any-return]


@contextmanager
def reaching(where: object) -> Iterator[None]:
    """Tell what went wrong with remote storage in one line.

    Raises:
        FormatError: in place of what a storage's library raises.
    """
    try:
        yield
    except SeedpackError:
        raise
    except Exception as error:  # each storage has its own
        raise FormatError(
            f"{where}: cannot be reached ({type(error).__name__}: {first_line(error)}); check the address, the network and the "
            "credentials"
        ) from error


def read_range(path: Path, start: int, size: int) -> bytearray:
    """Read some bytes of a file, those of remote storage by several range requests at once; fewer where the file ends."""
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    if not is_remote(path):
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while done < size and (count := file.readinto(view[done:])):  # one call reads at most 2 GB
                done += count
        return buffer[:done] if done < size else buffer
    remote: Any = path
    with reaching(path):
        for first in range(0, size, PIECE * AT_ONCE):
            starts = [start + at for at in range(first, min(size, first + PIECE * AT_ONCE), PIECE)]
            ends = [min(start + size, at + PIECE) for at in starts]
            for piece in remote.fs.cat_ranges([remote.path] * len(starts), starts, ends, on_error="raise"):
                view[done : done + len(piece)] = piece
                done += len(piece)
    return buffer[:done] if done < size else buffer
