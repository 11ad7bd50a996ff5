"""The command `seedpack inspect`."""

from __future__ import annotations

import difflib
import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seedpack.cli import output
from seedpack.errors import FormatError

if TYPE_CHECKING:
    from seedpack.formats.listing import Listing, StoredTensor

COLUMNS = ("shape", "stored as", "bits per weight", "bytes", "share")


@click.command("inspect")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--tensors",
    "pattern",
    is_flag=False,
    flag_value="*",
    metavar="[PATTERN]",
    help="List every tensor, or those whose name matches, instead of a line for each kind of layer.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(checkpoint: Path, pattern: str | None, as_json: bool) -> None:
    """Show the tensors of any CHECKPOINT, packed or not; no tensor data is read.

    CHECKPOINT is a .safetensors, .gguf or torch file, or a folder of them.
    """
    listing = _list(checkpoint)
    tensors = listing.tensors
    if pattern is not None and not (tensors := [t for t in tensors if fnmatch.fnmatch(t.name, pattern)]):
        names = [tensor.name for tensor in listing.tensors] or [""]
        near = difflib.get_close_matches(pattern, names, 1, 0)[0]
        raise FormatError(f"pattern {pattern!r} matches no tensor; names look like {near!r}")
    if as_json:
        output.show_json(_document(listing, tensors))
        return
    total = sum(tensor.nbytes for tensor in listing.tensors)
    if pattern is None:
        rows = [(f"{len(group)} × {kind}", *_cells(group, total)) for kind, group in listing.kinds().items()]
    else:
        rows = [(tensor.name, *_cells([tensor], total)) for tensor in tensors]
    heading = "tensors of a kind" if pattern is None else "tensor"
    output.show_table(str(checkpoint), (heading, *COLUMNS), rows)
    output.show_pairs("Checkpoint", _pairs(listing))


def _list(path: Path) -> Listing:
    """List a file by its first bytes, a folder by its files."""
    from seedpack.formats.foreign import first_bytes, foreign_kind
    from seedpack.formats.listing import list_safetensors

    kind = foreign_kind(first_bytes(path)) if path.is_file() else ""
    torch_files = [path] if kind == "a torch checkpoint" else []
    if path.is_dir() and not any(path.glob("*.safetensors")):
        torch_files = sorted(path.glob("pytorch_model*.bin"))
    if not torch_files and kind != "a GGUF file":
        return list_safetensors(path)
    from seedpack.converter.sources.listing import list_gguf, list_torch

    return list_torch(torch_files) if torch_files else list_gguf(path)


def _cells(tensors: list[StoredTensor], total: int) -> tuple[str, ...]:
    """Return a row's cells after the name: of one tensor, or of several of a kind."""
    stored = sum(tensor.nbytes for tensor in tensors)
    bits = 8 * stored / max(1, sum(tensor.weights for tensor in tensors))
    shapes = _several("×".join(map(str, tensor.shape)) or "scalar" for tensor in tensors)
    forms = _several(tensor.codec or tensor.dtype for tensor in tensors)
    return shapes, forms, f"{bits:.3f}", output.size(stored), f"{100 * stored / max(1, total):.1f}%"


def _several(values: Any) -> str:
    """Join different values, at most three of them."""
    different = list(dict.fromkeys(values))
    return ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")


def _pairs(listing: Listing) -> list[tuple[str, str]]:
    weights = sum(tensor.weights for tensor in listing.tensors)
    bits = 8 * listing.file_bytes / max(1, weights)
    pairs = [
        ("files", f"{len(listing.files)}, {output.size(listing.file_bytes)}"),
        (
            "tensors",
            f"{len(listing.tensors)}, {weights:,} weights, {bits:.4f} bits per weight on disk, headers included",
        ),
    ]
    if listing.shared:
        aliases = [f"{alias} = {name}" for alias, name in listing.shared.items()]
        pairs.append(("shared", ", ".join(aliases[:6])))
    if (manifest := listing.manifest) is None:
        return [*pairs, ("packed", "no; seedpack compress packs it")]
    codecs = [f"{c.id} v{c.version} {_settings(c.config)}" for c in manifest.codecs if c.id != "raw"]
    pairs += [("packed by", f"{manifest.writer}, format version {manifest.version}"), *(("codec", c) for c in codecs)]
    if manifest.views:
        pieces = ", ".join(list(manifest.views)[:6])
        pairs.append(("views", f"{len(manifest.views)} tensors that are pieces of stored ones: {pieces}"))
    if count := len(listing.undescribed):
        pairs.append(("not described", f"{count} raw tensors (the folder was saved again by transformers)"))
    return pairs


def _document(listing: Listing, tensors: list[StoredTensor]) -> dict[str, Any]:
    def tensor_json(tensor: StoredTensor) -> dict[str, Any]:
        stored = {"codec": tensor.codec or "raw", "bytes": tensor.nbytes, "bits_per_weight": tensor.bits_per_weight}
        return {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            **stored,
            "parts": tensor.parts,
        }

    document: dict[str, Any] = {
        "files": [str(file) for file in listing.files],
        "file_bytes": listing.file_bytes,
        "packed": listing.manifest is not None,
        "kinds": {
            kind: {"tensors": len(group), "bytes": sum(tensor.nbytes for tensor in group)}
            for kind, group in listing.kinds().items()
        },
        "shared": listing.shared,
        "undescribed": listing.undescribed,
        "tensors": [tensor_json(tensor) for tensor in tensors],
    }
    return document | ({} if listing.manifest is None else {"manifest": listing.manifest.to_json()})


def _settings(config: dict[str, Any]) -> str:
    def show(value: Any) -> str:
        return (
            f"{value['id']} ({_settings(value['config'])})" if isinstance(value, dict) and "id" in value else str(value)
        )

    return ", ".join(f"{key}={show(value)}" for key, value in config.items() if value is not None)
