"""The interface of every source of weights."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seedpack.dtypes import to_bytes
from seedpack.errors import ModelError
from seedpack.formats import Manifest
from seedpack.formats.digest import part_digest
from seedpack.formats.header import nbytes
from seedpack.formats.places import is_remote, reaching


@dataclass(frozen=True)
class SourceTensor:
    """A tensor as a source has it.

    Attributes:
        dtype: its safetensors name.
        shape: as stored.
        kind: what a model uses it for: linear, embedding, head (the output head, or an embedding tied to it), conv,
            expert, matrix (any other parameter), guess (by its name and shape alone), or "" (raw).
        transposed: stored [in, out].
        group: for experts, the parameter that all of the group become parts of in memory.
        stacked: its last two axes are those of matrices, each of which is packed alone.
        note: why it is raw.
        stored_bytes: in the source, where they are not those of dtype and shape.
    """

    dtype: str
    shape: tuple[int, ...]
    kind: str = ""
    transposed: bool = False
    group: str = ""
    stacked: bool = False
    note: str = ""
    stored_bytes: int | None = None

    @property
    def source_bytes(self) -> int:
        """Bytes of it in the source."""
        return nbytes(self.dtype, self.shape) if self.stored_bytes is None else self.stored_bytes


@dataclass(frozen=True)
class FileState:
    """Tells whether a file is still the one that it was: its device, number, size, and times of change, of its content and at all.

    In remote storage the number is a digest of what tells its version, or 0 where nothing does.
    """

    device: int
    number: int
    size: int
    time: int
    changed: int = 0

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Return the state of a file now; of none that is there, one that no file has."""
        if is_remote(path):
            return cls._of_remote(path)
        try:
            found = path.stat()
        except OSError:
            return cls(0, 0, -1, 0)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @classmethod
    def _of_remote(cls, path: Any) -> FileState:
        """Return the state of a file in remote storage, whose listing has its size, and a digest or a time."""
        with reaching(path):
            path.fs.invalidate_cache()
            found = path.fs.info(path.path)
        version = [str(found[key]) for key in VERSIONS if found.get(key)]
        number = int(hashlib.sha256(" ".join(version).encode()).hexdigest()[:15], 16) if version else 0
        return cls(0, number, found["size"] or 0, 0)

    @classmethod
    def of_all(cls, paths: Iterable[Path]) -> dict[Path, FileState]:
        """Return the states of some files."""
        return {path: cls.of(path) for path in paths}


VERSIONS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "created", "last_commit", "blob_id")
NO_FILES: Mapping[Path, FileState] = {}


class Kind(NamedTuple):
    """The fields of a `SourceTensor` that tell how it is packed."""

    kind: str = ""
    transposed: bool = False
    group: str = ""
    stacked: bool = False
    note: str = ""


KindOf = Callable[[str, tuple[int, ...]], Kind]  # of a tensor's name and shape


@dataclass(frozen=True)
class OpenModel:
    """A model that can run.

    Attributes:
        module: in float32, or partly on disk.
        tokenizer: where the model has one.
        layer_names: of a causal language model, the names of its decoder layers; empty for anything else.
        generate: of a causal language model, (module, tokens, context, seed, progress, snapshot) -> int64 [n, context],
            text that the model samples itself; progress is called with the tokens written since the last call, the snapshot is
            where to begin and where to keep what is written.
    """

    module: Any
    tokenizer: Any = None
    layer_names: tuple[str, ...] = ()
    generate: Callable[..., Tensor] | None = None


class Source(ABC):
    """A model's tensors, read one at a time.

    Attributes:
        name: where they come from, for messages.
        tensors: in file order.
        shared: further names of some tensors.
        config: of a Hugging Face model, whose output is a folder; None for anything else.
        dropped: what the input held beside tensors, for a note.
        files: that the tensors are read from, as they were when they were opened.
        input_bytes: of what was given: the files, or the tensors in memory.
        notes: on what was done to the tensors, a line each.
        local_name: what other processes of this machine open it by.
    """

    def __init__(
        self,
        name: str,
        tensors: dict[str, SourceTensor],
        *,
        shared: dict[str, str] | None = None,
        config: dict[str, Any] | None = None,
        dropped: Iterable[str] = (),
        files: Mapping[Path, FileState] = NO_FILES,
        notes: Iterable[str] = (),
    ):
        if not tensors:
            raise ModelError(f"{name}: holds no tensors; is it a state dict?")
        self.name, self.tensors, self.shared, self.config = name, tensors, shared or {}, config
        self.local_name = name
        self.dropped, self.files, self.notes = list(dropped), files, list(notes)
        self.input_bytes = sum(state.size for state in files.values()) or sum(t.source_bytes for t in tensors.values())
        self._digests: dict[str, str] = {}
        self._relied = False

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU; nothing of it stays in memory here.

        Raises:
            ModelError: its file was cut off or written to since it was opened.
        """
        for path, state in self.files.items():
            if not is_remote(path) and FileState.of(path).size != state.size:
                raise self._changed(path)
        tensor = self._read(name)
        if self.files:
            digest = part_digest(*to_bytes(tensor))
            if self._digests.setdefault(name, digest) != digest:
                raise self._changed(f"tensor {name!r}")
        return tensor

    def same(self, first: str, second: str) -> bool:
        """Return whether two tensors have the same values; both are in memory only if their bytes differ."""
        digests = (part_digest(*to_bytes(self.read(name))) for name in (first, second))
        return next(digests) == next(digests) or torch.equal(self.read(first), self.read(second))

    @property
    def named(self) -> dict[str, SourceTensor]:
        """The tensors by all their names, further ones of shared tensors too."""
        return self.tensors | {alias: self.tensors[name] for alias, name in self.shared.items()}

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """Return one tensor on the CPU."""

    def rely_on_state(self) -> None:
        """Take note that a tensor is known by the state of the files alone, without being read."""
        self._relied = True

    def require_unchanged(self) -> None:
        """Refuse files that were written to since they were opened: what was read could be parts of two models.

        Where a file's size, time or place differs, all tensors that were read are read again, and compared by digest; but where it
        was relied on the files' state, that is an error.
        """
        if any(FileState.of(path) != state for path, state in self.files.items()):
            if self._relied:
                raise self._changed("its files")
            for name in list(self._digests):
                self.read(name)

    def _changed(self, what: object) -> ModelError:
        return ModelError(
            f"{self.name}: {what} changed while the model was being read; run again when nothing writes to it"
        )

    def norm_power(self, name: str) -> Tensor | None:
        """Return the power of each input channel of a weight's layer [in], where a norm before it tells."""
        return None

    def parameters(self, name: str) -> list[str]:
        """Return the model's names of a tensor: that of its parameter first, then those tied to it."""
        return [name]

    def open_model(self) -> OpenModel:
        """Open the model to run it.

        Raises:
            ModelError: there is none to run.
        """
        raise ModelError(
            f"{self.name}: calibration runs the model, and a bare state dict has none to run; pass a Hugging Face folder, "
            "or from Python the module itself and batches"
        )

    def give_back(self) -> None:  # noqa: B027 (most have nothing to give back)
        """Put a live model back on the device that it was on: a run takes it to its own."""

    def take_tokenizer(self, tokenizer: Any) -> None:
        """Take a tokenizer along, which only models in memory need.

        Raises:
            ModelError: this is none.
        """
        raise ModelError(f"{self.name}: tokenizer is for a transformers model in memory; leave it out")

    @property
    def beside(self) -> Mapping[str, str]:
        """SHA-256 of the files beside the weights, as of the tokenizer, by name."""
        return {}

    def complete_output(self, folder: Path, manifest: Manifest, dtype: torch.dtype | None) -> None:
        """Write what a folder needs beside the packed weights; only a source with a `config` makes a folder.

        Args:
            folder: the output, not yet in its place.
            manifest: of the packed weights.
            dtype: that the model is to be loaded in, if it was asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} has no config, so its output is a file")

    @property
    def state(self) -> str:
        """Tells these tensors from others without reading them, by the state of their files; empty where that cannot tell.

        It is the same on all machines that see the files.
        """
        if not self.files or not all(state.number for state in self.files.values()):
            return ""
        files = [(path.name, s.number, s.size, s.time, s.changed) for path, s in self.files.items()]
        return hashlib.sha256(json.dumps([files, self.config], sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all tensors and the config."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode())
        for name in self.tensors:
            digest.update(name.encode())
            digest.update(part_digest(*to_bytes(self.read(name))).encode())
        return digest.hexdigest()
