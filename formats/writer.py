"""Write checkpoints: laid out before the first tensor is fitted, filled tensor by tensor, sealed at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from seedpack.errors import FormatError, OutputError
from seedpack.formats.digest import PLACEHOLDER, part_digest
from seedpack.formats.header import DTYPE_BYTES, dumps_canonical, layout, nbytes, serialise_header
from seedpack.formats.manifest import (
    MANIFEST_KEY,
    PRINCIPAL_PART,
    RAW,
    CodecSpec,
    Manifest,
    TensorEntry,
    View,
    blank_parts,
    merge,
    part_key,
    require_integer,
    require_own_shape,
    with_digests,
)

PartSpec = tuple[str, tuple[int, ...]]
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NO_VIEWS: Mapping[str, View] = {}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor before it is fitted: its codec, dense dtype and shape, and the dtypes and shapes of its parts."""

    name: str
    codec: CodecSpec
    dtype: str
    shape: tuple[int, ...]
    parts: Mapping[str, PartSpec]
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Size of all parts in bytes."""
        return sum(nbytes(dtype, shape) for dtype, shape in self.parts.values())


class FileWriter:
    """Writes one safetensors file: every planned tensor once, in any order, and on `close` the header.

    No reader accepts the file before that. Use it inside `staged`. Arguments as for `CheckpointWriter`.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[PlannedTensor],
        shared: Mapping[str, str],
        writer: str,
        *,
        manifest: bool = True,
        views: Mapping[str, View] = NO_VIEWS,
    ):
        self._with_manifest = manifest
        self._manifest = _blank_manifest(tensors, shared, writer, views)
        self._infos = layout(_specs(tensors))
        self._digests: dict[str, str] = {}
        self._path = path
        self._data_start = len(self._header())
        self._file = open(path, "xb")  # noqa: SIM115 (closed by close)
        try:
            _reserve(self._file.fileno(), self.file_bytes, path)
        except BaseException:
            self._file.close()
            raise

    @property
    def manifest(self) -> Manifest:
        """The manifest so far: digests of parts not yet written are placeholders."""
        return with_digests(self._manifest, {key: self._digests.get(key, PLACEHOLDER) for key in self._infos})

    @property
    def is_complete(self) -> bool:
        """True once every part is written."""
        return self._infos.keys() == self._digests.keys()

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self._data_start + max((info.end for info in self._infos.values()), default=0)

    def write(self, name: str, parts: Mapping[str, tuple[str, tuple[int, ...], bytes | memoryview]]) -> None:
        """Store the parts of one tensor, each as (dtype, shape, bytes), which must be the planned ones."""
        planned = self._manifest.tensors[name].parts
        if parts.keys() != planned.keys():
            raise FormatError(f"tensor {name!r}: planned parts {sorted(planned)}, got {sorted(parts)}")
        for part, (dtype, shape, data) in parts.items():
            info = self._infos[part_key(name, part)]
            if (dtype, tuple(shape)) != (info.dtype, info.shape) or len(data) != info.nbytes:
                raise FormatError(
                    f"tensor {name!r}, part {part!r}: planned {info.dtype} {list(info.shape)} of {info.nbytes} bytes, "
                    f"got {dtype} {list(shape)} of {len(data)}"
                )
            self._file.seek(self._data_start + info.start)
            self._file.write(data)
            self._digests[part_key(name, part)] = part_digest(dtype, shape, data)

    def close(self) -> None:
        """Write the header with all digests and flush to disk, unless that is done."""
        if self._file.closed:
            return
        missing = self._infos.keys() - self._digests.keys()
        if missing:
            self._file.close()
            raise FormatError(f"{self._path.name}: {len(missing)} parts were never written, such as {min(missing)!r}")
        header = self._header()
        assert len(header) == self._data_start, "digests have one length"
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abort(self) -> None:
        """Close the file unfinished; `staged` removes it."""
        self._file.close()

    def _header(self) -> bytes:
        metadata = {"format": "pt"}
        if self._with_manifest:
            metadata[MANIFEST_KEY] = self.manifest.dumps()
        return serialise_header(self._infos, metadata)


def file_bytes(tensors: Sequence[PlannedTensor], shared: Mapping[str, str], writer: str) -> int:
    """Return the size of one file with these tensors, header included."""
    infos = layout(_specs(tensors))
    metadata = {"format": "pt", MANIFEST_KEY: _blank_manifest(tensors, shared, writer, NO_VIEWS).dumps()}
    return len(serialise_header(infos, metadata)) + max((info.end for info in infos.values()), default=0)


def checkpoint_bytes(
    tensors: Sequence[PlannedTensor], shared: Mapping[str, str], writer: str, shard_bytes: int | None = None
) -> int:
    """Return the size of the files that a `CheckpointWriter` makes of these tensors, headers included, the index left out."""
    shards = [({tensor.name for tensor in shard}, shard) for shard in _shards(tensors, shard_bytes)]
    return sum(
        file_bytes(shard, {alias: stored for alias, stored in shared.items() if stored in names}, writer)
        for names, shard in shards
    )


class CheckpointWriter:
    """Writes a checkpoint to one file, or into a folder as one file or shards with an index.

    Args:
        path: an existing folder, or a new file.
        tensors: all that will be written.
        shared: further names of stored tensors.
        writer: the program's name and version.
        shard_bytes: in a folder, start a new shard before the parts of one exceed this.
        manifest: False writes a plain safetensors file, for dense models.
        views: tensors of the model that are pieces of stored ones.
        finished: called with each file as soon as it is whole, which may take it away; then no more than one is begun at a time, as
            long as tensors are written in their order. By default all files claim their disk space at once.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[PlannedTensor],
        shared: Mapping[str, str],
        writer: str,
        *,
        shard_bytes: int | None = None,
        manifest: bool = True,
        views: Mapping[str, View] = NO_VIEWS,
        finished: Callable[[Path], None] | None = None,
    ):
        self._path, self._finished = path, finished
        self._folder = path if path.is_dir() else None
        shards = _shards(tensors, shard_bytes) if self._folder else [list(tensors)]
        self._writers: dict[str, FileWriter] = {}
        self._file_of: dict[str, str] = {}
        self._begin: dict[str, Callable[[], FileWriter]] = {}
        for number, shard in enumerate(shards, 1):
            names = {tensor.name for tensor in shard}
            file = _shard_name(number, len(shards))
            self._begin[file] = partial(
                FileWriter,
                path / file if self._folder else path,
                shard,
                {alias: stored for alias, stored in shared.items() if stored in names},
                writer,
                manifest=manifest,
                views={alias: view for alias, view in views.items() if view.tensor in names},
            )
            self._file_of |= dict.fromkeys(names, file)
        try:
            for file in [] if finished else self._begin:
                self._writer(file)
        except BaseException:
            self.__exit__(OSError, None, None)
            raise

    def _writer(self, file: str) -> FileWriter:
        if file not in self._writers:
            self._writers[file] = self._begin[file]()
        return self._writers[file]

    @property
    def manifest(self) -> Manifest:
        """The manifest of the whole checkpoint."""
        return merge([writer.manifest for writer in self._writers.values()], "checkpoint")

    @property
    def file_bytes(self) -> int:
        """Size of all files that are begun."""
        return sum(writer.file_bytes for writer in self._writers.values())

    def write(self, name: str, parts: Mapping[str, tuple[str, tuple[int, ...], bytes | memoryview]]) -> None:
        """Store the parts of one tensor; see `FileWriter.write`."""
        file = self._file_of[name]
        writer = self._writer(file)
        writer.write(name, parts)
        if self._finished is not None and writer.is_complete:
            writer.close()
            self._finished(self._path / file if self._folder else self._path)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for writer in self._writers.values():
                writer.abort() if kind else writer.close()
        finally:
            for writer in self._writers.values():
                writer.abort()
        if self._folder and len(self._writers) > 1 and not kind:
            self._write_index(self._folder / INDEX_FILE)

    def _write_index(self, path: Path) -> None:
        weight_map = {key: name for name, writer in self._writers.items() for key in writer._infos}
        total = sum(info.nbytes for writer in self._writers.values() for info in writer._infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        path.write_text(json.dumps(index, indent=2) + "\n")


def _blank_manifest(
    tensors: Sequence[PlannedTensor], shared: Mapping[str, str], writer: str, views: Mapping[str, View]
) -> Manifest:
    codecs = sorted({dumps_canonical(tensor.codec.to_json()): tensor.codec for tensor in tensors}.items())
    index = {text: i for i, (text, _) in enumerate(codecs)}
    entries = {
        tensor.name: TensorEntry(
            index[dumps_canonical(tensor.codec.to_json())],
            tensor.dtype,
            tuple(tensor.shape),
            blank_parts(tensor.parts),
            tensor.transposed,
        )
        for tensor in tensors
    }
    if len(entries) != len(tensors):
        raise FormatError("two planned tensors have the same name")
    for tensor in tensors:
        for part, (dtype, shape) in tensor.parts.items():
            if dtype not in DTYPE_BYTES:
                raise FormatError(f"tensor {tensor.name!r}: dtype {dtype!r} cannot be stored")
            if tensor.codec.id != RAW:
                require_integer(part_key(tensor.name, part), dtype, "writer")
                if part == PRINCIPAL_PART:
                    require_own_shape(tensor.name, shape, tensor.shape, "writer")
    return Manifest(tuple(codec for _, codec in codecs), entries, dict(shared), writer, views=dict(views))


def _specs(tensors: Sequence[PlannedTensor]) -> dict[str, PartSpec]:
    specs: dict[str, PartSpec] = {}
    for tensor in tensors:
        for part, spec in tensor.parts.items():
            if specs.setdefault(part_key(tensor.name, part), spec) is not spec:
                raise FormatError(f"tensor {tensor.name!r}: its part {part!r} would overwrite another tensor")
    return specs


def _shards(tensors: Sequence[PlannedTensor], shard_bytes: int | None) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shard_bytes and shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _shard_name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _reserve(descriptor: int, size: int, path: Path) -> None:
    """Claim the disk space now, so that a full disk is found before hours of fitting."""
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.truncate(descriptor, size)
    except OSError as error:
        raise OutputError(
            f"{path.parent}: cannot reserve {size / 1e6:.1f} MB: {error.strerror}; free space or name another output"
        ) from error
