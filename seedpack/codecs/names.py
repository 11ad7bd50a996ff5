"""Names of codecs, and the bits per weight that they take: known without importing any of them."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from seedpack.errors import CodecError

OWN = {
    "basis": "seedpack.codecs.basis:BasisCodec",
    "mask": "seedpack.codecs.mask:MaskCodec",
    "raw": "seedpack.codecs.raw:RawCodec",
    "seedlm": "seedpack.codecs.seedlm:SeedLMCodec",
    "stack": "seedpack.codecs.stack:StackCodec",
    "svd": "seedpack.codecs.svd:SVDCodec",
    "trellis": "seedpack.codecs.trellis:TrellisCodec",
}  # known without an installation too
REGISTRY: dict[str, Any] = {}  # the classes that are imported
BITS = {
    "basis": "up to 32",
    "seedlm": "3, 4",
    "svd": "up to 64",
    "trellis": "1 to 8",
}  # those that `require_bits` lets by


def codec_ids() -> list[str]:
    """Return all known ids."""
    return sorted(OWN.keys() | REGISTRY.keys() | plugins().keys())


def plugins() -> dict[str, EntryPoint]:
    """Return the entry points by id: packages are scanned once, and again only when a folder of them has changed."""
    return _scanned(tuple((path, os.stat(path).st_mtime_ns) for path in sys.path if os.path.exists(path)))


@lru_cache(maxsize=1)
def _scanned(folders: tuple[tuple[str, int], ...]) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in reversed(tuple(entry_points(group="seedpack.codecs")))}  # the first one wins


def require_bits(codec: str, bits: float) -> None:
    """Refuse bits per weight that a codec is known not to take.

    Raises:
        CodecError: with those that it takes.
    """
    if codec == "trellis" and not 1 <= bits <= 8:
        raise CodecError(f"{codec}: {bits} bits: must be from 1 to 8")
    if codec == "seedlm" and bits not in (3, 4):
        raise CodecError(
            f"{codec}: {bits:g} bits: the paper gives configurations for 3 and 4; other rates are set as --set seed_bits=16 "
            "--set rank=3 --set block=6, which makes (16 + 4 + 4·3) / 6 = 5.33 bits per weight"
        )
    if not 0 < bits <= 64:
        raise CodecError(f"{codec}: {bits} bits: must be above 0 and at most 64")
