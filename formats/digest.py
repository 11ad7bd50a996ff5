"""SHA-256 digests of parts: of their bytes, and of the dtype and shape that they are read with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

DIGEST_CHARS = 64
PLACEHOLDER = "0" * DIGEST_CHARS


def part_digest(dtype: str, shape: Sequence[int], data: bytes | bytearray | memoryview) -> str:
    """Return the digest of one stored part (docs/format.md, M12).

    >>> part_digest("U8", (2,), b"ab")[:16]
    '0ed5bb6711170ae8'
    """
    return pieces_digest(dtype, shape, [data])


def pieces_digest(dtype: str, shape: Sequence[int], pieces: Iterable[bytes | bytearray | memoryview]) -> str:
    """Return the digest of one stored part whose bytes come in pieces."""
    digest = hashlib.sha256(f"{dtype}[{','.join(map(str, shape))}]\n".encode())
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def verifies() -> bool:
    """Return whether loading compares digests: unless the environment variable SEEDPACK_VERIFY is 0."""
    return os.environ.get("SEEDPACK_VERIFY", "1") != "0"
