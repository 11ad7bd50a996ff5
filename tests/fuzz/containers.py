"""Targets: headers, manifests, files and folders."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from seedpack.formats import Checkpoint
from seedpack.formats.header import header_length, layout, parse_header, serialise_header
from seedpack.formats.listing import codec_label, list_safetensors
from seedpack.formats.manifest import loads_manifest, manifest_from_json, merge
from seedpack.formats.record import RECORD_FILE, foreign_files, write_record
from seedpack.formats.writer import INDEX_FILE
from seedpack.loader.dense import dense_state
from seedpack.loader.verify import verify
from tests.fuzz.draws import Draws, edited
from tests.fuzz.sound import MOST, room, sealed, sound
from tests.helpers import checkpoints


def header_text(data: bytes) -> None:
    """Parse a header's text behind a byte that says how many bytes follow it, or read the eight bytes before one."""
    if data[:1] == b"\xff":
        header_length(data[1:9], len(data), "x")
        return
    parse_header(data[1:], 7 + len(data) + sum(data[:1]), "x", whole=bool(len(data) % 2))


def header(data: bytes) -> None:
    """Parse a sound header with changes; what is accepted can be written, and is the same when it is read again."""
    draws = Draws(data)
    file = draws.pick(sound())
    text = json.dumps(edited(file.header, draws)).encode()
    parsed = parse_header(text, 8 + len(text) + len(file.body), "x")
    infos = layout({name: (info.dtype, info.shape) for name, info in parsed.tensors.items()})
    again = serialise_header(infos, {})
    assert parse_header(again[8:], len(again) + len(file.body), "x").tensors == infos


def manifest_text(data: bytes) -> None:
    """Read a manifest's text."""
    loads_manifest(data.decode("utf-8", "surrogateescape"), "x")


def manifest(data: bytes) -> None:
    """Read a sound manifest with changes; what is accepted is the same when it is read again."""
    draws = Draws(data)
    read = manifest_from_json(sealed(edited(draws.pick(sound()).manifest, draws)), "x")
    assert loads_manifest(read.dumps(), "x").dumps() == read.dumps()
    assert merge([read], "x").tensors.keys() == read.tensors.keys() >= read.packed_only().tensors.keys()
    for spec in read.codecs:
        codec_label(spec)


def _use(path: Path) -> None:
    """List, verify and load a file or folder."""
    list_safetensors(path)
    with Checkpoint(path, max_bytes=MOST) as checkpoint:
        list(verify(checkpoint))
        dense_state(checkpoint)


def file(data: bytes) -> None:
    """Use a file of any bytes."""
    path = room() / "any.safetensors"
    path.write_bytes(data)
    _use(path)


def checkpoint(data: bytes) -> None:
    """Use a sound file with changes, whole and by half of its levels."""
    draws = Draws(data)
    path = room() / "changed.safetensors"
    path.write_bytes(draws.pick(sound()).changed(draws))
    with Checkpoint(path, fraction=0.5, max_bytes=MOST) as first:
        dense_state(first)
    _use(path)


@cache
def _folder() -> tuple[Path, dict[str, Any]]:
    """Return a folder of two shards, and the JSON documents beside them by name."""
    path = room() / "folder"
    path.mkdir()
    checkpoints.write(path, shard_bytes=30)
    with Checkpoint(path) as whole:
        config = {"quantization_config": {"quant_method": "seedpack", **whole.manifest.packed_only().to_json()}}
    (path / "config.json").write_text(json.dumps(config))
    write_record(path)
    return path, {name: json.loads((path / name).read_text()) for name in (INDEX_FILE, "config.json", RECORD_FILE)}


def folder(data: bytes) -> None:
    """Use a folder whose index, config and record are changed."""
    draws = Draws(data)
    path, documents = _folder()
    for name, document in documents.items():
        made = edited(document, draws, 2)
        if name == "config.json" and isinstance(made.get("quantization_config"), dict):
            made["quantization_config"] = _sealed_beside_method(made["quantization_config"])
        (path / name).write_text(json.dumps(sealed(made) if name == RECORD_FILE else made, sort_keys=True))
    foreign_files(path)
    _use(path)


def _sealed_beside_method(document: dict[str, Any]) -> dict[str, Any]:
    body = {key: value for key, value in document.items() if key != "quant_method"}
    return {**document, "digest": sealed(body).get("digest")}


def remove_files() -> None:
    """Remove what the targets have written."""
    shutil.rmtree(room(), ignore_errors=True)
