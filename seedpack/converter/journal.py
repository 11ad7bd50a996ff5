"""Tensors that are fitted are kept beside the output until it stands, so that an interrupted run goes on where it stopped.

An entry is named by all that its bytes follow from: the tensor's own, the codec with its settings, the statistics that it is
fitted with, the device's kind. So a run of other choices takes what is the same, and nothing else. A second name has the state
of the source's files in place of the tensor's bytes: by that an entry is found without reading the source.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from seedpack._version import __version__
from seedpack.codecs.importance import Importance
from seedpack.codecs.registry import codec_to_json
from seedpack.converter.plan import TensorPlan
from seedpack.converter.report import TensorReport
from seedpack.dtypes import to_bytes
from seedpack.errors import OutputError, first_line
from seedpack.formats.digest import part_digest
from seedpack.formats.header import header_length, layout, parse_header, serialise_header
from seedpack.formats.places import is_remote, reaching

NUMBERS = ("error", "energy", "seconds", "output_error", "output_energy")  # of a report
Entry = tuple[dict[str, Tensor], TensorReport]


class Journal:
    """A folder of fitted tensors, which `formats.staging` removes once the output stands.

    Args:
        folder: made with the first entry; here or in remote storage.
        kind: of the device that fits, and the backend: they may round in their own ways.
        state: of the source's files, "" for one in memory (see `Source.state`).
    """

    def __init__(self, folder: Path, kind: str, state: str):
        self.folder, self.kind, self.state = folder, kind, state
        self._checked: dict[str, str] = {}
        self._new_checks: dict[str, str] = {}
        self.refresh()
        self._before = set(self._of_place)

    def refresh(self) -> None:
        """Take note of what other processes have put here."""
        remote: Any = self.folder
        with reaching(remote) if is_remote(remote) else nullcontext():
            if is_remote(remote):
                remote.fs.invalidate_cache()
            found = list(remote.glob("*.safetensors")) if remote.exists() else []
        self._of_place = {path.name.split("-")[0]: path for path in found}
        self._of_bytes = {path.stem.rpartition("-")[2]: path for path in found}

    def place_name(self, tensor: TensorPlan, measured: Importance) -> str:
        """Return the name of an entry by where its tensor lies.

        Args:
            tensor: how it is packed.
            measured: the importance that it is fitted with, as far as that does not follow from the source.
        """
        return _name([*self._how(tensor), tensor.name, self.state], [measured.values])

    def bytes_name(self, tensor: TensorPlan, value: Tensor, importance: Importance) -> str:
        """Return the name of an entry by the bytes of its tensor.

        Args:
            tensor: how it is packed.
            value: the tensor as the source has it.
            importance: that it is fitted with.
        """
        return _name(self._how(tensor), [value, importance.values])

    def _how(self, tensor: TensorPlan) -> list[object]:
        codec = codec_to_json(tensor.codec)
        return [__version__, self.kind, codec, list(tensor.shape), tensor.transposed, tensor.dtype]

    def at_place(self, tensor: TensorPlan, measured: Importance) -> Entry | None:
        """Return the parts and the report of a tensor, if they are here and whole, and its file is as it was."""
        path = self._of_place.get(self.place_name(tensor, measured)) if self.state else None
        return None if path is None else self._read(path, tensor)

    def of_bytes(self, name: str, tensor: TensorPlan) -> Entry | None:
        """Return the parts and the report of an entry by the name that `bytes_name` has given, if it is here and whole."""
        path = self._of_bytes.get(name)
        return None if path is None else self._read(path, tensor)

    def _read(self, path: Path, tensor: TensorPlan) -> Entry | None:
        try:
            data = path.read_bytes()
            length = header_length(data[:8], len(data), str(path))
            kept, parts = parse_header(data[8 : 8 + length], len(data), str(path)).metadata, load(data)
            if kept["digest"] != tensors_digest(parts):
                return None
            tensor.codec.check(parts, tensor.codec_shape)
            return parts, TensorReport(tensor, **{name: float(kept[name]) for name in NUMBERS})
        except Exception:  # half of a file, or another's: it is fitted again
            return None

    def put(self, place: str, name: str, parts: Mapping[str, Tensor], report: TensorReport) -> None:
        """Keep a tensor's parts.

        Args:
            place: as `place_name` gives it.
            name: as `bytes_name` gives it.
            parts: of the tensor.
            report: of the tensor.

        Raises:
            OutputError: the disk is full, or cannot be written.
        """
        numbers = {number: repr(getattr(report, number)) for number in NUMBERS}
        metadata = {**numbers, "digest": tensors_digest(parts)}
        path = self.folder / f"{place}-{name}.safetensors"
        if self._of_place and not is_remote(path) and not self.folder.exists():
            raise OutputError(f"{self.folder}: was removed by a run that has written the output meanwhile")
        write_file(path, lambda partial: _write_parts(partial, parts, metadata), shared=True)
        self._of_place[place] = self._of_bytes[name] = path
        self.write_checked()

    def __len__(self) -> int:
        return len(self._of_place)

    def missing(
        self, tensors: Iterable[TensorPlan], importance: Callable[[str], Importance], *, before: bool = False
    ) -> list[TensorPlan]:
        """Return which of some tensors have no entry; one in memory may have changed since its entry was made.

        Args:
            tensors: to look for.
            importance: by name, as for `place_name`.
            before: take only entries that were here before this run.
        """
        known = self._before if before else self._of_place.keys()
        return [t for t in tensors if not known or self.place_name(t, importance(t.name)) not in known]

    @property
    def checked(self) -> Mapping[str, str]:
        """By the names of tensors whose values were looked at: why not to pack them, or ""."""
        if not self._checked and self.state and self.folder.exists():
            for path in self.folder.glob(f"values-{self.state[:32]}-*.json"):
                with suppress(Exception):  # half of a file: they are looked at again
                    self._checked |= {str(key): str(value) for key, value in json.loads(path.read_bytes()).items()}
        return self._checked

    def add_checked(self, found: Mapping[str, str]) -> None:
        """Take note of what values were found to be, with the first entry to come."""
        self._new_checks |= found

    def write_checked(self) -> None:
        """Keep what values were found to be, for runs to come; done by the first `put` too."""
        if self._new_checks and self.state:
            text, names = json.dumps(self._new_checks), _name(sorted(self._new_checks), [])
            path = self.folder / f"values-{self.state[:32]}-{names}.json"
            write_file(path, lambda partial: partial.write_text(text), shared=True)
        self._new_checks = {}


def _write_parts(path: Path, parts: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file without a copy of its parts in memory."""
    stored = {name: to_bytes(part) for name, part in parts.items()}
    infos = layout({name: (dtype, shape) for name, (dtype, shape, _) in stored.items()})
    with path.open("wb") as file:
        file.write(serialise_header(infos, metadata))
        for name in infos:
            file.write(stored[name][2])


def _name(how: Iterable[object], values: Iterable[Tensor | None]) -> str:
    digest = hashlib.sha256(json.dumps(list(how)).encode())
    for value in values:
        digest.update(b"" if value is None else part_digest(*to_bytes(value)).encode())
    return digest.hexdigest()[:32]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of some tensors with their names."""
    digests = {name: part_digest(*to_bytes(tensor)) for name, tensor in sorted(tensors.items())}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def write_file(path: Path, write: Callable[[Path], object], *, shared: bool = False) -> None:
    """Write beside a file, and put it in its place when it is whole and on the disk; in remote storage a file is whole at once.

    Args:
        path: the file.
        write: what writes it, to the path that it is called with.
        shared: other processes may be writing it too.
    """
    if is_remote(path):
        try:
            write(path)
        except Exception as error:  # each storage has its own
            raise OutputError(f"{path}: cannot be written: {first_line(error)}; run the same command again") from error
        return
    own = f"{os.getpid()}-{secrets.token_hex(4)}." if shared else ""
    partial = path.parent / f".{path.name}.{own}partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        descriptor = os.open(partial, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        by_disk = isinstance(error, OSError) or (isinstance(error, SafetensorError) and "I/O error" in str(error))
        if not by_disk:
            raise
        raise OutputError(
            f"{path.parent}: cannot be written: {getattr(error, 'strerror', None) or error}; free space, and run the same command again: it goes on "
            "from there"
        ) from error
