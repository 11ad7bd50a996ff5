"""Read checkpoints: check the header in full first, then touch only the parts that are asked for."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from seedpack.errors import DigestError, FormatError, NotPackedError
from seedpack.formats.digest import part_digest, pieces_digest, verifies
from seedpack.formats.files import is_file
from seedpack.formats.files import read_json as read_json
from seedpack.formats.foreign import first_bytes, foreign_kind, is_compressible
from seedpack.formats.header import (
    Header,
    header_length,
    layout,
    level_of,
    parse_header,
    serialise_header,
)
from seedpack.formats.manifest import (
    MANIFEST_KEY,
    Manifest,
    loads_manifest,
    manifest_from_json,
    merge,
    part_key,
    require_integer,
    require_own_shape,
)
from seedpack.formats.places import is_remote, reaching, read_range
from seedpack.formats.writer import INDEX_FILE, SINGLE_FILE

QUANT_METHOD = "seedpack"
BESIDE_MANIFEST = ("quant_method", "bits")  # keys of a quantization_config
PIECE = 1 << 20  # bytes that are read at once


@dataclass(frozen=True)
class Part:
    """One stored part: `data` is a view of the mapped file (private: writing to it does not change the file)."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file, here or in remote storage."""
    try:
        with reaching(path) if is_remote(path) else nullcontext():
            size = path.stat().st_size
        length = header_length(bytes(read_range(path, 0, 8)), size, str(path))
        return parse_header(bytes(read_range(path, 8, length)), size, str(path))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None


class SafetensorsFile:
    """One safetensors file, mapped into memory; only its header has been read and checked.

    Args:
        path: of the file.
        whole: False takes a file that was cut off at its end too.
    """

    def __init__(self, path: Path, *, whole: bool = True):
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            self.size = size = os.fstat(self._file.fileno()).st_size
            length = header_length(self._file.read(8), size, str(path))
            self._header_bytes = self._file.read(length)
            self.header: Header = parse_header(self._header_bytes, size, str(path), whole=whole)
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        except BaseException:
            self._file.close()
            raise
        self._data_bytes = size - self.header.data_start

    def holds(self, key: str) -> bool:
        """Return whether all bytes of a tensor that the header names are there."""
        return self.header.tensors[key].end <= self._data_bytes

    def part(self, key: str) -> Part:
        """Return the tensor stored under a key, as a view of the file."""
        info = self.header.tensors.get(key)
        if info is None:
            raise FormatError(f"{self.path}: no such tensor: {key!r}")
        start = self.header.data_start
        return Part(info.dtype, info.shape, memoryview(self._map)[start + info.start : start + info.end])

    def require_digest(self, name: str, part: str, stored: str) -> None:
        """Refuse a part of a tensor whose bytes are not those that the digest was made of."""
        content = self.part(part_key(name, part))
        self._require_digest(name, part, stored, part_digest(content.dtype, content.shape, content.data))

    def require_digest_on_disk(self, file: BinaryIO, name: str, part: str, stored: str) -> None:
        """Do so with bytes read from the open file, not mapped: who cuts it off meanwhile does not end the process."""
        info = self.header.tensors[part_key(name, part)]
        file.seek(self.header.data_start + info.start)
        sizes = (min(PIECE, info.nbytes - done) for done in range(0, info.nbytes, PIECE))
        self._require_digest(name, part, stored, pieces_digest(info.dtype, info.shape, map(file.read, sizes)))

    def _require_digest(self, name: str, part: str, stored: str, actual: str) -> None:
        if actual != stored:
            raise DigestError(
                f"{self.path}: tensor {name!r}, part {part!r}: its bytes changed since they were "
                f"written (digest {actual[:16]}…, stored {stored[:16]}…); fetch the file again"
            )

    def manifest(self) -> Manifest | None:
        """Return the seedpack manifest in the file's metadata, or None."""
        text = self.header.metadata.get(MANIFEST_KEY)
        if text is None:
            return None
        if self.header.metadata != {"format": "pt", MANIFEST_KEY: text}:
            raise FormatError(
                f"{self.path}: __metadata__ must hold 'format': 'pt' and {MANIFEST_KEY!r}, and nothing else"
            )
        return loads_manifest(text, str(self.path))

    def require_canonical(self) -> None:
        """Refuse a header that says the same in other bytes: one of its bits was changed."""
        manifest = self.manifest()
        assert manifest is not None, "asked only of files with a manifest"
        infos = layout({key: (info.dtype, info.shape) for key, info in self.header.tensors.items()})
        canonical = serialise_header(infos, {"format": "pt", MANIFEST_KEY: manifest.dumps()})
        if canonical[8:] != self._header_bytes:
            raise DigestError(f"{self.path}: the header's bytes changed since they were written; fetch the file again")

    def close(self) -> None:
        """Close the file; the mapping lives on while parts of it are in use."""
        self._file.close()


class Checkpoint:
    """A packed checkpoint: one file, or a folder with `model.safetensors` or an index and shards.

    Opening it checks every rule of the format that needs no tensor data; `verify` checks the data.

    Args:
        path: a file or folder.
        fraction: read no more than this share of the levels of tensors that have levels, above 0 and at most 1; files may
            be cut off at their end then, as long as the first level of every tensor is there.
        max_bytes: that decoding may take, for those who decode; None leaves it to them.
    """

    def __init__(self, path: str | Path, *, fraction: float | None = None, max_bytes: int | None = None):
        self.path, self.fraction, self.max_bytes = Path(path), fraction, max_bytes
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
            raise FormatError(f"{path}: max_bytes must be a whole number from 1, got {max_bytes!r}")
        if fraction is not None and not 0 < fraction <= 1:
            raise FormatError(f"{path}: fraction must be above 0 and at most 1, got {fraction}")
        self.files: list[SafetensorsFile] = []
        try:
            for file in weight_files(self.path):
                _require_no_foreign(file)
                self.files.append(SafetensorsFile(file, whole=fraction is None))
            self._file_of = self._index_keys()
            self.manifest = self._find_manifest()
            self._check_parts()
        except BaseException:
            self.close()
            raise

    def part(self, name: str, part: str, *, check: bool | None = None) -> Part:
        """Return one part of a tensor; `check` compares its digest, by default unless SEEDPACK_VERIFY is 0."""
        key = part_key(name, part)
        if verifies() if check is None else check:
            self._file_of[key].require_digest(name, part, self.manifest.tensors[name].parts[part])
        return self._file_of[key].part(key)

    def parts(self, name: str, *, check: bool | None = None) -> dict[str, Part]:
        """Return all parts of a tensor, or with a fraction those of the levels that are read."""
        return {part: self.part(name, part, check=check) for part in self.part_names(name)}

    def part_names(self, name: str) -> list[str]:
        """Return the parts of a tensor to read: with a fraction only those of the first levels, as far as they are there.

        Raises:
            FormatError: a part of the first level is cut off.
        """
        parts = list(self.manifest.tensors[name].parts)
        if self.fraction is None:
            return parts
        levels = 1 + max(map(level_of, parts))
        wanted = max(1, int(self.fraction * levels + 1e-9))
        keys = {part: part_key(name, part) for part in parts}
        cut_off = [level_of(part) for part, key in keys.items() if not self._file_of[key].holds(key)]
        if 0 in cut_off:
            raise FormatError(
                f"{self.path}: cut off before the first level of tensor {name!r} ends; fetch more of the file"
            )
        return [part for part in parts if level_of(part) < min([wanted, *cut_off])]

    def raw_keys(self) -> list[str]:
        """Return the keys in the files that the manifest does not describe (a folder saved again by transformers)."""
        described = {key for name in self.manifest.tensors for key in self.manifest.part_keys(name).values()}
        return sorted(self._file_of.keys() - described)

    def undescribed(self, key: str) -> Part:
        """Return the tensor under one of `raw_keys`."""
        if not self._file_of[key].holds(key):
            raise FormatError(f"{self.path}: cut off before tensor {key!r} ends; fetch more of the file")
        return self._file_of[key].part(key)

    @property
    def stored_bytes(self) -> int:
        """Size on disk of all weight files, headers included."""
        return sum(file.size for file in self.files)

    def verify(self) -> Iterator[tuple[str, DigestError | None]]:
        """Check every part of every tensor against its digest, yielding (tensor, error or None) as it goes."""
        for file in self.files:
            if MANIFEST_KEY in file.header.metadata:
                file.require_canonical()
        for name in self.manifest.tensors:
            try:
                self.parts(name, check=True)
            except DigestError as error:
                yield name, error
            else:
                yield name, None

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _index_keys(self) -> dict[str, SafetensorsFile]:
        file_of: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for key in file.header.tensors:
                if key in file_of:
                    raise FormatError(
                        f"{self.path}: tensor {key!r} is in {file_of[key].path.name} and {file.path.name}"
                    )
                file_of[key] = file
        index = self.path / INDEX_FILE
        stored = {key: file.path.name for key, file in file_of.items()}
        if self.path.is_dir() and index.is_file() and _weight_map(index) != stored:
            raise FormatError(f"{index}: its entries are not those of the shards; fetch the folder again")
        return file_of

    def _find_manifest(self) -> Manifest:
        of_files = [manifest for file in self.files if (manifest := file.manifest()) is not None]
        of_config = self._config_manifest()
        if of_files and len(of_files) == len(self.files):
            merged = merge(of_files, str(self.path))
            if of_config is not None:
                require_same_manifest(merged, of_config, str(self.path / "config.json"))
            return merged
        if of_config is not None:
            return of_config
        raise NotPackedError(
            f"{self.path} is not packed: {self.files[0].path.name} has no manifest of seedpack in its metadata; "
            f"run seedpack compress {self.path} first"
        )

    def _config_manifest(self) -> Manifest | None:
        config = self.path / "config.json"
        if not self.path.is_dir() or not config.is_file():
            return None
        return manifest_from_config(read_json(config), str(config))

    def _check_parts(self) -> None:
        """Require every part that the manifest names to be in the files, and raw tensors to be of its dtype and shape."""
        for name, entry in self.manifest.tensors.items():
            for part, key in self.manifest.part_keys(name).items():
                if key not in self._file_of:
                    raise FormatError(f"{self.path}: tensor {name!r}: its part {part!r} ({key!r}) is not in the files")
            info = self._file_of[name].header.tensors[name]
            if self.manifest.is_packed(name):
                require_own_shape(name, info.shape, entry.shape, str(self.path))
                for key in self.manifest.part_keys(name).values():
                    require_integer(key, self._file_of[key].header.tensors[key].dtype, str(self.path))
            elif (info.dtype, info.shape) != (entry.dtype, entry.shape):
                raise FormatError(
                    f"{self.path}: tensor {name!r}: stored as {info.dtype} {list(info.shape)}, "
                    f"manifest says {entry.dtype} {list(entry.shape)}"
                )
        if any(MANIFEST_KEY in file.header.metadata for file in self.files) and (stray := self.raw_keys()):
            raise FormatError(f"{self.path}: {len(stray)} stored tensors are not in the manifest, such as {stray[0]!r}")


def require_same_manifest(of_files: Manifest, of_config: Manifest, where: str) -> None:
    """Refuse a config.json whose manifest is not that of the weight files beside it."""
    if of_config != of_files.packed_only():
        raise FormatError(
            f"{where}: its quantization_config is not that of the weight files; fetch the whole folder again"
        )


def manifest_from_config(config: object, where: str) -> Manifest | None:
    """Return the manifest in a Hugging Face config's `quantization_config` (top level or text sub-config), or None."""
    if not isinstance(config, dict):
        raise FormatError(f"{where}: expected a JSON object")
    for holder in (config, config.get("text_config")):
        quantization = holder.get("quantization_config") if isinstance(holder, dict) else None
        if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
            return manifest_of_quantization(quantization, where)
    return None


def manifest_of_quantization(document: Mapping[str, Any], where: str) -> Manifest:
    """Return the manifest in a `quantization_config`, which holds what others read beside it."""
    return manifest_from_json({key: value for key, value in document.items() if key not in BESIDE_MANIFEST}, where)


def weight_files(path: Path) -> list[Path]:
    """Return a file of weights, or those of a folder: its only one, or the shards of its index.

    Raises:
        FormatError: there are none in safetensors.
    """
    try:
        if path.is_file():
            return [path]
        folder = path.is_dir()
    except (OSError, ValueError) as error:
        raise FormatError(f"{str(path)[:200]}: not a valid path ({error})") from None
    if not folder:
        raise FormatError(f"{path}: no such file or folder")
    index = path / INDEX_FILE
    if not index.is_file():
        if not (path / SINGLE_FILE).is_file():
            if others := sorted(path.glob("pytorch_model*.bin")):
                name = others[0].name
                raise NotPackedError(f"{path} is not packed: it holds {name}; run seedpack compress {path} first")
            raise FormatError(f"{path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        return [path / SINGLE_FILE]
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if Path(name).name != name or not is_file(path / name):
            raise FormatError(f"{index}: names the shard {name[:120]!r}, which is not a file in {path}")
    return [path / name for name in names]


def _require_no_foreign(path: Path) -> None:
    """Refuse a file of another kind, whose header would be refused without a remedy."""
    prefix = first_bytes(path)
    if kind := foreign_kind(prefix):
        remedy = f"; run seedpack compress {path} first" if is_compressible(prefix) else ""
        raise NotPackedError(f"{path} is {kind}, not a packed checkpoint{remedy}")


def _weight_map(index: Path) -> dict[str, str]:
    document = read_json(index)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError(f"{index}: 'weight_map' must map tensor names to file names")
    return weight_map
