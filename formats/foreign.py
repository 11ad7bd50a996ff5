"""Tell by its first bytes which other kind of file one is; safetensors begins with the length of its header."""

from __future__ import annotations

from pathlib import Path

COMPRESSIBLE = {
    b"PK\x03\x04": "a torch checkpoint",
    b"\x80": "a torch checkpoint",  # a bare pickle, the format before torch 1.6
    b"GGUF": "a GGUF file",
}
FOREIGN = COMPRESSIBLE | {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"RIFF": "a WebP image or a recording",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
    b"version ": "a Git LFS pointer (git lfs pull fetches the file)",
    b"<!": "a web page",
    b"<html": "a web page",
}


def foreign_kind(prefix: bytes) -> str:
    """Return the kind of a file that is not in safetensors, with an article; "" if its first eight bytes do not tell."""
    if prefix[4:] == bytes(4):  # a header of less than 4 GB
        return ""
    return next((kind for magic, kind in FOREIGN.items() if prefix.startswith(magic)), "")


def is_compressible(prefix: bytes) -> bool:
    """Return whether `seedpack compress` takes files that begin so."""
    return foreign_kind(prefix) in COMPRESSIBLE.values()


def first_bytes(path: Path) -> bytes:
    """Return the first eight bytes of a file; fewer where there are none."""
    try:
        with open(path, "rb") as file:
            return file.read(8)
    except OSError:
        return b""
