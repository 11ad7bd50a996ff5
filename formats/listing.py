"""List the tensors of a checkpoint, packed or dense, from headers alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seedpack.errors import NotPackedError
from seedpack.formats.manifest import CodecSpec, Manifest
from seedpack.formats.reader import Checkpoint, SafetensorsFile, weight_files
from seedpack.formats.writer import INDEX_FILE, SINGLE_FILE

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole component of a name


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is stored.

    Attributes:
        name: of the tensor.
        shape: of the weight, not of its parts.
        dtype: of the weight: a safetensors name, or a type of GGUF.
        nbytes: of all its parts.
        codec: id, and code bits where it has them; "" for a tensor that seedpack has not packed.
        parts: of a packed checkpoint, by name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    codec: str = ""
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Count of elements."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight."""
        return 8 * self.nbytes / max(1, self.weights)

    @property
    def kind(self) -> str:
        """The name with `*` for numbers: layers of a kind have the same.

        >>> StoredTensor("layers.10.fc1.weight", (), "F32", 4).kind
        'layers.*.fc1.weight'
        """
        return _NUMBER.sub("*", self.name)


@dataclass(frozen=True)
class Listing:
    """The tensors of a checkpoint in natural order, layer 2 before layer 10.

    Attributes:
        tensors: sorted.
        files: that hold them.
        shared: further names of some.
        manifest: of a packed checkpoint.
        undescribed: names of raw tensors that the manifest of a packed folder does not have.
    """

    tensors: list[StoredTensor]
    files: list[Path]
    shared: dict[str, str] = field(default_factory=dict)
    manifest: Manifest | None = None
    undescribed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tensors.sort(key=lambda tensor: natural_key(tensor.name))

    @property
    def file_bytes(self) -> int:
        """Size of the files, headers included."""
        return sum(file.stat().st_size for file in self.files)

    def kinds(self) -> dict[str, list[StoredTensor]]:
        """Return the tensors by kind."""
        groups: dict[str, list[StoredTensor]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.kind, []).append(tensor)
        return groups


def natural_key(name: str) -> list[Any]:
    """Return the key that sorts numbers in names by their size."""
    pieces = re.split(r"([0-9]+)", name)
    return [(len(n := piece.lstrip("0")), n) if i % 2 else (-1, piece) for i, piece in enumerate(pieces)]


def list_safetensors(path: Path) -> Listing:
    """List a safetensors file or a folder of them, packed or dense.

    Raises:
        NotPackedError: there are weights, but none in safetensors.
    """
    named = any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    if not named and (others := sorted(path.glob("*.safetensors"))):  # names that transformers does not give
        return _list_dense(others)
    try:
        with Checkpoint(path) as checkpoint:
            return list_packed(checkpoint)
    except NotPackedError:
        return _list_dense(weight_files(path))


def _list_dense(files: list[Path]) -> Listing:
    tensors = []
    for path in files:
        file = SafetensorsFile(path)
        file.close()
        tensors += [StoredTensor(name, t.shape, t.dtype, t.nbytes) for name, t in file.header.tensors.items()]
    return Listing(tensors, files)


def list_packed(checkpoint: Checkpoint) -> Listing:
    """List a packed checkpoint that is open."""
    manifest = checkpoint.manifest

    def stored(name: str) -> StoredTensor:
        entry, codec = manifest.tensors[name], codec_label(manifest.codec_of(name))
        infos = {part: checkpoint.part(name, part, check=False) for part in entry.parts}
        total = sum(len(info.data) for info in infos.values())
        parts = {
            part: {"dtype": info.dtype, "shape": list(info.shape), "digest": entry.parts[part]}
            for part, info in infos.items()
        }
        return StoredTensor(name, entry.shape, entry.dtype, total, "" if codec == "raw" else codec, parts)

    undescribed = {key: checkpoint.undescribed(key) for key in checkpoint.raw_keys()}
    tensors = [stored(name) for name in manifest.tensors]
    tensors += [StoredTensor(key, part.shape, part.dtype, len(part.data)) for key, part in undescribed.items()]
    files = [file.path for file in checkpoint.files]
    return Listing(tensors, files, manifest.shared, manifest, list(undescribed))


def codec_label(spec: CodecSpec) -> str:
    """Return a codec's id, with its code bits where tensors may differ in them."""
    inner = spec.config.get("of")
    if isinstance(inner, dict) and isinstance(inner.get("id"), str) and isinstance(inner.get("config"), dict):
        return f"{_label(inner['id'], inner['config'])}, stacked"
    return _label(spec.id, spec.config)


def _label(id: str, config: dict[str, Any]) -> str:
    bits = config.get("code_bits")
    return f"{id} {bits}" if type(bits) in (int, float) else id
