"""Files that are sound, taken apart, so that a target can change them and make their digests right again."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from seedpack.formats.digest import part_digest
from seedpack.formats.header import dumps_canonical
from seedpack.formats.manifest import _document_digest, part_key
from tests.fuzz.draws import Draws, edited
from tests.helpers.bombs import write_blank_image
from tests.helpers.checkpoints import join, split

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
MOST = 20_000_000  # bytes that decoding may take here: less than half a second of work


@cache
def room() -> Path:
    """Return a folder for files, in memory where there is one."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="seedpack-fuzz-", dir=shared if shared.is_dir() else None))


@dataclass(frozen=True)
class Sound:
    """A file: its header without the metadata, its manifest, and the bytes behind."""

    header: dict[str, Any]
    manifest: dict[str, Any]
    body: bytes

    @classmethod
    def of(cls, data: bytes) -> Sound:
        header, body = split(data)
        return cls(header, json.loads(header.pop("__metadata__")["seedpack"]), body)

    def data(self, key: str) -> bytes:
        """Return the bytes under a key."""
        start, end = self.header[key]["data_offsets"]
        return self.body[start:end]

    def changed(self, draws: Draws) -> bytes:
        """Return the file with changes to its bytes, manifest and header; most digests are made right again."""
        body = bytearray(self.body)
        for _ in range(draws.below(4)):
            body[draws.below(len(body))] ^= 1 + draws.below(255)
        document = edited(self.manifest, draws)
        if draws.below(4) != 3:
            self._seal_parts(document, bytes(body))
        metadata = {"__metadata__": {"format": "pt", "seedpack": dumps_canonical(sealed(document))}}
        header = json.dumps({**metadata, **edited(self.header, draws, 2)}, separators=(",", ":"), ensure_ascii=False)
        text = header.encode("utf-8", "surrogatepass")
        return join(text + b" " * (-len(text) % 8), bytes(body))

    def _seal_parts(self, document: dict[str, Any], body: bytes) -> None:
        tensors = document.get("tensors")
        for name, entry in tensors.items() if isinstance(tensors, dict) else ():
            parts = entry.get("parts") if isinstance(entry, dict) else None
            if not isinstance(parts, dict):
                continue
            for part in parts:
                if info := self.header.get(part_key(name, part)):
                    start, end = info["data_offsets"]
                    parts[part] = part_digest(info["dtype"], info["shape"], body[start:end])


@cache
def sound(pattern: str = "*") -> list[Sound]:
    """Return the golden files of codecs, and of `field` a blank image."""
    files = [Sound.of(path.read_bytes()) for path in sorted(GOLDEN.glob(f"{pattern}.v*/*/packed.safetensors"))]
    if pattern in ("*", "field"):
        path = write_blank_image(room() / f"field{len(files)}", 9, 14)
        files.append(Sound.of(path.read_bytes()))
        path.unlink()
    return files


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document whose digest is right, where it can have one."""
    try:
        return {**document, "digest": _document_digest({k: v for k, v in document.items() if k != "digest"})}
    except UnicodeEncodeError:  # a lone surrogate
        return document
