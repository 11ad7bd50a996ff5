"""The command `seedpack inspect`."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import click

from seedpack.cli import output


@click.command("inspect")
@click.argument("packed")
@click.option("--tensors", "pattern", default="*", metavar="PATTERN", help="Show only tensors whose name matches.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(packed: str, pattern: str, as_json: bool) -> None:
    """Show the header and the tensors of the checkpoint PACKED; no tensor data is read."""
    from seedpack.formats import Checkpoint

    with Checkpoint(packed) as checkpoint:
        manifest = checkpoint.manifest
        rows = [_row(checkpoint, name) for name in manifest.tensors if fnmatch.fnmatch(name, pattern)]
        undescribed = checkpoint.raw_keys()
        stored = checkpoint.stored_bytes
        files = [str(file.path) for file in checkpoint.files]
    if as_json:
        document = {"files": files, "file_bytes": stored, "undescribed": undescribed, "tensors": rows}
        output.show_json({**document, "manifest": manifest.to_json()})
        return
    output.show_table(
        f"{packed}",
        ("tensor", "shape", "dtype", "codec", "bits per weight", "stored"),
        [
            (
                r["name"],
                "×".join(map(str, r["shape"])),
                r["dtype"],
                r["codec"],
                f"{r['bits_per_weight']:.3f}",
                output.size(r["bytes"]),
            )
            for r in rows
        ],
    )
    weights = sum(math.prod(entry.shape) for entry in manifest.tensors.values())
    codecs = [f"{c.id} v{c.version} {_settings(c.config)}" for c in manifest.codecs]
    pairs = [
        ("written by", f"{manifest.writer}, format version {manifest.version}"),
        ("files", f"{len(files)}, {output.size(stored)}"),
        (
            "weights",
            f"{weights:,} described, {8 * stored / max(1, weights):.4f} bits per weight on disk, headers included",
        ),
        *[("codec", codec) for codec in codecs if not codec.startswith("raw ")],
    ]
    if manifest.shared:
        pairs.append(("shared", ", ".join(f"{alias} = {name}" for alias, name in list(manifest.shared.items())[:6])))
    if manifest.views:
        pieces = ", ".join(list(manifest.views)[:6])
        pairs.append(("views", f"{len(manifest.views)} tensors that are pieces of stored ones: {pieces}"))
    if undescribed:
        pairs.append(("not described", f"{len(undescribed)} raw tensors (the folder was saved again by transformers)"))
    output.show_pairs("Checkpoint", pairs)


def _row(checkpoint: Any, name: str) -> dict[str, Any]:
    entry = checkpoint.manifest.tensors[name]
    infos = {part: checkpoint.part(name, part, check=False) for part in entry.parts}
    total = sum(len(part.data) for part in infos.values())
    return {
        "name": name,
        "shape": list(entry.shape),
        "dtype": entry.dtype,
        "codec": checkpoint.manifest.codec_of(name).id,
        "bytes": total,
        "bits_per_weight": 8 * total / max(1, math.prod(entry.shape)),
        "parts": {
            part: {"dtype": p.dtype, "shape": list(p.shape), "digest": entry.parts[part]} for part, p in infos.items()
        },
    }


def _settings(config: dict[str, Any]) -> str:
    def show(value: Any) -> str:
        return (
            f"{value['id']} ({_settings(value['config'])})" if isinstance(value, dict) and "id" in value else str(value)
        )

    return ", ".join(f"{key}={show(value)}" for key, value in config.items() if value is not None)
