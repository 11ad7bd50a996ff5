"""Small valid checkpoints, and ways to break them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seedpack.formats import CheckpointWriter, CodecSpec, PlannedTensor
from seedpack.formats.manifest import _document_digest

SEEDLM = CodecSpec("seedlm", 0, {"seed_bits": 16, "block": 8, "rank": 3, "exponents": 3})
RAW = CodecSpec("raw", 1, {"dtype": "F32"})
PLANNED = [
    PlannedTensor(
        "a.weight",
        SEEDLM,
        "F32",
        (3, 16),
        {"weight": ("U8", (3, 2, 2)), "codes": ("U8", (3, 2, 2)), "exponent_bias": ("I8", (1,))},
    ),
    PlannedTensor("b", RAW, "F32", (5,), {"weight": ("F32", (5,))}),
]
SHARED = {"tied.weight": "a.weight"}


def contents(tensor: PlannedTensor) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    from seedpack.formats.header import nbytes

    return {
        part: (dtype, shape, bytes((7 * i + 1) % 251 or 1 for i in range(nbytes(dtype, shape))))
        for part, (dtype, shape) in tensor.parts.items()
    }


def write(path: Path, **options: Any) -> Path:
    with CheckpointWriter(path, PLANNED, SHARED, "test", **options) as writer:
        for tensor in PLANNED:
            writer.write(tensor.name, contents(tensor))
    return path


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def join(header: dict[str, Any] | str | bytes, body: bytes) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + body


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, body = split(path.read_bytes())
    change(header)
    path.write_bytes(join(header, body))


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], None], *, seal: bool = True) -> None:
    """Change the manifest; `seal` makes its digest right again."""

    def apply(header: dict[str, Any]) -> None:
        manifest = json.loads(header["__metadata__"]["seedpack"])
        change(manifest)
        if seal:
            manifest["digest"] = _document_digest({k: v for k, v in manifest.items() if k != "digest"})
        header["__metadata__"]["seedpack"] = json.dumps(manifest, sort_keys=True, separators=(",", ":"))

    edit_header(path, apply)
