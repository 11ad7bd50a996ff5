"""The manifest: one JSON document that says how each tensor of a checkpoint is rebuilt, and from which bytes.

It stands in a file's `__metadata__` under "seedpack", and in a Hugging Face folder's `config.json` as
`quantization_config` (packed tensors only, with `quant_method` beside it). `manifest.schema.json` is its schema.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from seedpack.errors import DigestError, FormatError, VersionError
from seedpack.formats.digest import PLACEHOLDER
from seedpack.formats.header import DTYPE_BYTES, check_name, check_shape, dumps_canonical, loads_strict
from seedpack.formats.version import FORMAT_VERSION

MANIFEST_KEY = "seedpack"
PRINCIPAL_PART = "weight"
RAW = "raw"

_PART_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_CODEC_ID = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CodecSpec:
    """A codec in a file: id, version of its bit layout, hyperparameters."""

    id: str
    version: int
    config: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {"id": self.id, "version": self.version, "config": self.config}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the model: its codec (index into `Manifest.codecs`), dense dtype and shape, parts' digests.

    `transposed`: the codec saw the matrix transposed, because the model stores it [in, out].
    """

    codec: int
    dtype: str
    shape: tuple[int, ...]
    parts: dict[str, str]
    transposed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        value = {"codec": self.codec, "dtype": self.dtype, "shape": list(self.shape), "parts": self.parts}
        return {**value, "transposed": True} if self.transposed else value


@dataclass(frozen=True)
class View:
    """A tensor of the model that is a piece of a stored one: its elements from `offset` on, row by row, times `scale`."""

    tensor: str
    offset: int
    shape: tuple[int, ...]
    scale: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {"tensor": self.tensor, "offset": self.offset, "shape": list(self.shape), "scale": self.scale}


@dataclass(frozen=True)
class Manifest:
    """All that a reader needs beside the bytes.

    Attributes:
        codecs: of all tensors.
        tensors: the stored ones, by name.
        shared: further names of stored tensors, {name: stored}.
        writer: the program's name and version.
        version: of the format.
        views: tensors of the model that are pieces of a stored one, which is then not a tensor of the model itself.
    """

    codecs: tuple[CodecSpec, ...]
    tensors: dict[str, TensorEntry]
    shared: dict[str, str] = field(default_factory=dict)
    writer: str = ""
    version: int = FORMAT_VERSION
    views: dict[str, View] = field(default_factory=dict)

    def codec_of(self, name: str) -> CodecSpec:
        """Return the codec of a tensor."""
        return self.codecs[self.tensors[name].codec]

    def is_packed(self, name: str) -> bool:
        """Return whether a tensor is stored by any codec but `raw`."""
        return self.codec_of(name).id != RAW

    def part_keys(self, name: str) -> dict[str, str]:
        """Return the safetensors key of each part of a tensor."""
        return {part: part_key(name, part) for part in self.tensors[name].parts}

    def select(self, names: Iterable[str]) -> Manifest:
        """Return the manifest of some of the tensors, with only the codecs, shared names and views that they have."""
        tensors = {name: self.tensors[name] for name in names}
        used = sorted({entry.codec for entry in tensors.values()})
        new_index = {old: new for new, old in enumerate(used)}
        return replace(
            self,
            codecs=tuple(self.codecs[i] for i in used),
            tensors={name: replace(entry, codec=new_index[entry.codec]) for name, entry in tensors.items()},
            shared={alias: name for alias, name in self.shared.items() if name in tensors},
            views={name: view for name, view in self.views.items() if view.tensor in tensors},
        )

    def packed_only(self) -> Manifest:
        """Return the manifest of the packed tensors, which `config.json` holds."""
        return self.select(name for name in self.tensors if self.is_packed(name))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document, its own digest included."""
        document: dict[str, Any] = {
            "seedpack": self.version,
            "writer": self.writer,
            "codecs": [codec.to_json() for codec in self.codecs],
            "tensors": {name: entry.to_json() for name, entry in self.tensors.items()},
            "shared": self.shared,
        }
        if self.views:
            document["views"] = {name: view.to_json() for name, view in self.views.items()}
        return {**document, "digest": _document_digest(document)}

    def dumps(self) -> str:
        """Return the canonical JSON text."""
        return dumps_canonical(self.to_json())


def part_key(name: str, part: str) -> str:
    """Return the key that a part of tensor `name` is stored under: for the principal part the tensor's own name.

    >>> part_key("a.b.weight", "weight"), part_key("a.b.weight", "codes"), part_key("emb", "codes")
    ('a.b.weight', 'a.b.codes', 'emb.codes')
    """
    return name if part == PRINCIPAL_PART else f"{name.removesuffix('.weight')}.{part}"


def merge(manifests: list[Manifest], where: str) -> Manifest:
    """Return the manifest of a sharded checkpoint from those of its files."""
    codecs: dict[str, CodecSpec] = {}
    tensors: dict[str, TensorEntry] = {}
    shared: dict[str, str] = {}
    views: dict[str, View] = {}
    texts = [[dumps_canonical(codec.to_json()) for codec in manifest.codecs] for manifest in manifests]
    for manifest, own in zip(manifests, texts, strict=True):
        codecs |= zip(own, manifest.codecs, strict=True)
    index = {text: i for i, text in enumerate(sorted(codecs))}
    for manifest, own in zip(manifests, texts, strict=True):
        for name, entry in manifest.tensors.items():
            if name in tensors:
                raise FormatError(f"{where}: tensor {name!r} is described by two shards")
            tensors[name] = replace(entry, codec=index[own[entry.codec]])
        for name in (*manifest.shared, *manifest.views):
            if name in shared or name in views:
                raise FormatError(f"{where}: tensor {name!r} is described by two shards")
        shared |= manifest.shared
        views |= manifest.views
    if both := tensors.keys() & (shared.keys() | views.keys()):
        raise FormatError(f"{where}: tensor {min(both)!r} is described by two shards")
    ordered = tuple(codecs[text] for text in sorted(codecs))
    return Manifest(ordered, tensors, shared, manifests[0].writer, manifests[0].version, views)


def loads_manifest(text: str, where: str) -> Manifest:
    """Read a manifest's JSON text; see `manifest_from_json`."""
    return manifest_from_json(loads_strict(text, f"{where}: seedpack manifest"), where)


def manifest_from_json(document: object, where: str) -> Manifest:
    """Check a manifest document in full and return it.

    Raises:
        VersionError: it was written by a newer seedpack.
        DigestError: it does not match its own digest.
        FormatError: any other rule is broken, with the place.
    """
    at = f"{where}: seedpack manifest"
    if not isinstance(document, dict):
        raise FormatError(f"{at}: expected a JSON object, got {type(document).__name__}")
    version = document.get("seedpack")
    if type(version) is not int or version < 1:
        raise FormatError(f"{at}: 'seedpack' must be the format version, got {str(version)[:40]!r}")
    if version > FORMAT_VERSION:
        raise VersionError(
            f"{at}: format version {version}, this seedpack reads up to {FORMAT_VERSION}; "
            "install a newer seedpack-torch"
        )
    _require_keys(document, {"seedpack", "writer", "codecs", "tensors", "shared", "digest"}, {"views"}, at)
    body = {key: value for key, value in document.items() if key != "digest"}
    try:
        expected = _document_digest(body)
    except (RecursionError, UnicodeEncodeError) as error:
        raise FormatError(f"{at}: cannot be written as JSON in UTF-8 ({type(error).__name__})") from None
    if document["digest"] != expected:
        stored = str(document["digest"])[:16]
        raise DigestError(
            f"{at}: its bytes changed since it was written (digest {expected[:16]}…, stored {stored}…); "
            "fetch the file again"
        )
    if not isinstance(document["writer"], str):
        raise FormatError(f"{at}: 'writer' must be a string")
    codecs = tuple(_codec_spec(value, f"{at}: codec {i}") for i, value in enumerate(_list(document, "codecs", at)))
    tensors = {
        name: _tensor_entry(value, len(codecs), f"{at}: tensor {name[:120]!r}")
        for name, value in _object(document, "tensors", at).items()
    }
    shared = _object(document, "shared", at)
    for alias, name in shared.items():
        check_name(alias, at)
        if alias in tensors or not isinstance(name, str) or name not in tensors:
            raise FormatError(f"{at}: shared name {alias[:80]!r} must be new and point to a stored tensor")
    views = {
        name: _view(value, name, tensors, shared, f"{at}: view {name[:120]!r}")
        for name, value in (_object(document, "views", at) if "views" in document else {}).items()
    }
    if "views" in document and not views:
        raise FormatError(f"{at}: 'views' must be left out where there are none")
    _require_covered(views, tensors, at)
    _require_unique_keys(tensors, at)
    return Manifest(codecs, tensors, shared, document["writer"], version, views)


def with_digests(manifest: Manifest, digests: Mapping[str, str]) -> Manifest:
    """Return the manifest with the digest of each part filled in; `digests` maps safetensors keys to digests."""
    tensors = {
        name: replace(entry, parts={part: digests[part_key(name, part)] for part in entry.parts})
        for name, entry in manifest.tensors.items()
    }
    return replace(manifest, tensors=tensors)


def blank_parts(parts: Iterable[str]) -> dict[str, str]:
    """Return a placeholder of the same length for the digest of each part, not known yet."""
    return dict.fromkeys(sorted(parts), PLACEHOLDER)


def require_integer(key: str, dtype: str, where: str) -> None:
    """Require a part of a packed tensor to be of integers, which loaders and casts leave unchanged (M16)."""
    if dtype[0] not in "UI":
        raise FormatError(f"{where}: {key!r} is a part of a packed tensor and must be of integers, not {dtype}")


def require_own_shape(name: str, principal: Sequence[int], dense: Sequence[int], where: str) -> None:
    """Refuse a principal part that could be taken for the dense weight (M16)."""
    if tuple(principal) == tuple(dense):
        raise FormatError(
            f"{where}: tensor {name!r}: its principal part has the shape of the dense weight {list(dense)}"
        )


def _document_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(dumps_canonical(body).encode()).hexdigest()


def _codec_spec(value: object, at: str) -> CodecSpec:
    if not isinstance(value, dict):
        raise FormatError(f"{at}: expected a JSON object")
    _require_keys(value, {"id", "version", "config"}, set(), at)
    if not isinstance(value["id"], str) or not _CODEC_ID.fullmatch(value["id"]):
        raise FormatError(f"{at}: not a valid codec id: {str(value['id'])[:40]!r}")
    if type(value["version"]) is not int or value["version"] < 0:
        raise FormatError(f"{at}: version must be a whole number from 0")
    return CodecSpec(value["id"], value["version"], _object(value, "config", at))


def _tensor_entry(value: object, codecs: int, at: str) -> TensorEntry:
    if not isinstance(value, dict):
        raise FormatError(f"{at}: expected a JSON object")
    _require_keys(value, {"codec", "dtype", "shape", "parts"}, {"transposed"}, at)
    if type(value["codec"]) is not int or not 0 <= value["codec"] < codecs:
        raise FormatError(f"{at}: codec must be a number below {codecs}")
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPE_BYTES:
        raise FormatError(f"{at}: unknown dtype {str(value['dtype'])[:40]!r}")
    shape = value["shape"]
    check_shape(shape, at)
    parts = _object(value, "parts", at)
    if PRINCIPAL_PART not in parts:
        raise FormatError(f"{at}: no principal part {PRINCIPAL_PART!r}")
    for part, digest in parts.items():
        if not _PART_NAME.fullmatch(part) or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise FormatError(f"{at}: part {part[:40]!r} needs a name in a-z, 0-9, _ and a SHA-256 digest")
    if value.get("transposed", True) is not True or ("transposed" in value and len(shape) != 2):
        raise FormatError(f"{at}: 'transposed' is true or left out, and for matrices only")
    return TensorEntry(value["codec"], value["dtype"], tuple(shape), parts, "transposed" in value)


def _view(value: object, name: str, tensors: Mapping[str, TensorEntry], shared: Mapping[str, str], at: str) -> View:
    if not isinstance(value, dict):
        raise FormatError(f"{at}: expected a JSON object")
    check_name(name, at)
    _require_keys(value, {"tensor", "offset", "shape", "scale"}, set(), at)
    check_shape(value["shape"], at)
    offset, scale = value["offset"], value["scale"]
    if not isinstance(value["tensor"], str) or value["tensor"] not in tensors or name in tensors or name in shared:
        raise FormatError(f"{at}: must be a new name for a piece of a stored tensor")
    if type(offset) is not int or offset < 0 or type(scale) is not float or not math.isfinite(scale):
        raise FormatError(f"{at}: offset must be a whole number from 0, and scale a number")
    size = math.prod(tensors[value["tensor"]].shape)
    if offset + math.prod(value["shape"]) > size:
        raise FormatError(f"{at}: ends at element {offset + math.prod(value['shape'])} of {size}")
    return View(value["tensor"], offset, tuple(value["shape"]), scale)


def _require_covered(views: Mapping[str, View], tensors: Mapping[str, TensorEntry], at: str) -> None:
    """Require views to use all but less than a row of their tensor, so that few bytes cannot decode to many for nothing."""
    used: dict[str, int] = {}
    for view in views.values():
        used[view.tensor] = used.get(view.tensor, 0) + math.prod(view.shape)
    for name, count in used.items():
        size, rows = math.prod(tensors[name].shape), (*tensors[name].shape, 1)[0]
        if count < size - max(0, rows - 1):
            raise FormatError(f"{at}: views use {count} of the {size} elements of {name[:120]!r}")


def _require_unique_keys(tensors: Mapping[str, TensorEntry], at: str) -> None:
    owner: dict[str, str] = {}
    for name, entry in tensors.items():
        for part in entry.parts:
            key = part_key(name, part)
            if owner.setdefault(key, name) != name:
                raise FormatError(f"{at}: tensors {owner[key]!r} and {name!r} both claim the key {key!r}")


def _require_keys(value: dict[str, Any], required: set[str], optional: set[str], at: str) -> None:
    missing, unknown = required - value.keys(), value.keys() - required - optional
    if missing or unknown:
        problem = f"missing keys {sorted(missing)}" if missing else f"unknown keys {sorted(unknown)[:4]}"
        raise FormatError(f"{at}: {problem}; expected {sorted(required)}")


def _list(value: dict[str, Any], key: str, at: str) -> list[Any]:
    items = value[key]
    if not isinstance(items, list):
        raise FormatError(f"{at}: {key!r} must be a list")
    return items


def _object(value: dict[str, Any], key: str, at: str) -> dict[str, Any]:
    members = value[key]
    if not isinstance(members, dict):
        raise FormatError(f"{at}: {key!r} must be an object")
    return members
