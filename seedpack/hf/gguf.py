"""GGUF files: dequantised a tensor at a time, under the names and in the layout that transformers gives them."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seedpack.converter.sources.base import FileState, OpenModel, Source, SourceTensor
from seedpack.errors import ModelError, first_line
from seedpack.formats import Manifest
from seedpack.hf.beside import Beside
from seedpack.hf.checkpoint_names import CheckpointNames
from seedpack.hf.complete import load_complete
from seedpack.hf.internals import GGUFConversion, converts_gguf_at_once, gguf_config
from seedpack.hf.language_model import open_pretrained
from seedpack.hf.pretrained import PretrainedSource

VALUES_AT_ONCE = 1 << 20  # that are dequantised
FLOATS = ("F32", "F16", "BF16")  # types that are no blocks
WHOLE = "the whole model was dequantised in memory: transformers does not convert its tensors one at a time"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a GGUF file has it.

    Attributes:
        type: of gguf's `GGMLQuantizationType`.
        shape: as torch has it.
        start: its first byte in the file.
        nbytes: of it in the file.
    """

    type: Any
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def rows(self) -> int:
        """The count of its rows: blocks do not go beyond one."""
        return math.prod(self.shape[:-1])


def open_gguf(path: Path) -> Source:
    """Open a GGUF file: a tensor at a time where transformers converts its tensors so, else its whole model in memory.

    Raises:
        ModelError: it cannot be read, or lacks tensors of its model.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{path}: reading GGUF needs gguf; pip install gguf")
    try:
        source: Source | None = _open_by_tensor(path)
        if source is None:
            source = PretrainedSource(_load_whole(path), str(path))
            source.input_bytes = path.stat().st_size
            source.notes.append(WHOLE)
    except ModelError:
        raise
    except Exception as error:  # the parser meets foreign bytes: whatever it raises, they are no model
        raise ModelError(f"{path}: transformers cannot read it ({first_line(error)})") from error
    if (tokenizer := _tokenizer(path)) is None:
        source.dropped.append("its tokenizer, which transformers cannot convert,")
    else:
        source.take_tokenizer(tokenizer)
    return source


class GGUFSource(Source):
    """A GGUF file, whose tensors are dequantised to float32 when they are read.

    Args:
        path: the file.
        stored: its tensors, by its own names.
        conversion: of transformers.
        members: the file's names of what each tensor of the model is made of, by the model's names.
        model: on the meta device.
    """

    def __init__(
        self,
        path: Path,
        stored: Mapping[str, StoredTensor],
        conversion: GGUFConversion,
        members: dict[str, list[str]],
        model: Any,
    ):
        self._path, self._stored, self._conversion, self._members = path, stored, conversion, members
        self._beside = Beside(model)
        self._names = CheckpointNames(model)
        own = self._names.restricted(members)
        super().__init__(
            str(path),
            {name: self._form(name, own) for name in self._names.names if name in members},
            config=self._beside.config,
            files=FileState.of_all([path]),
            notes=_notes(stored[member] for group in members.values() for member in group),
        )

    def _form(self, name: str, names: CheckpointNames) -> SourceTensor:
        shape = names.shape(name) or ()
        size = sum(self._stored[member].nbytes for member in self._members[name])
        return SourceTensor("F32", shape, *names.kind(name, shape), stored_bytes=size)

    @property
    def state(self) -> str:
        """Tells these tensors from others: by the file, and what makes tensors of it."""
        return hashlib.sha256(f"{super().state} {version('transformers')}".encode()).hexdigest()

    def _read(self, name: str) -> Tensor:
        members, shape = self._members[name], self.tensors[name].shape
        if not all(map(_is_of_experts, members)):
            return self._converted(name, {member: self._dense(member) for member in members}, shape)
        value = torch.empty(shape, dtype=torch.float32)
        for index in range(shape[0]):
            expert = {member: self._dense(member, index) for member in members}
            value[index] = self._converted(name, expert, (1, *shape[1:]))[0]
        return value

    def _converted(self, name: str, dense: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
        value: Tensor = next(iter(self._conversion.convert(dense).values()))
        if tuple(value.shape) != shape:
            raise ModelError(
                f"{self.name}: tensor {name!r} is {list(value.shape)}, and by the file's own config {list(shape)}; fetch it again"
            )
        return value.contiguous()

    def _dense(self, member: str, index: int | None = None) -> Any:
        """Return a tensor of the file, or only one matrix of its first axis, as an array of float32 [..., columns]."""
        import gguf

        stored = self._stored[member]
        shape = stored.shape if index is None else (1, *stored.shape[1:])
        rows, row_bytes = math.prod(shape[:-1]), stored.nbytes // max(1, stored.rows)
        columns, start = shape[-1], stored.start + (index or 0) * rows * row_bytes
        dense = np.empty((rows, columns), np.float32)
        with open(self._path, "rb") as file:
            file.seek(start)
            at_once = max(1, VALUES_AT_ONCE // max(1, columns))
            for first in range(0, rows, at_once):
                piece = dense[first : first + at_once]
                data = file.read(len(piece) * row_bytes)
                if len(data) != len(piece) * row_bytes:
                    raise self._changed(self._path)
                piece[:] = gguf.dequantize(np.frombuffer(data, np.uint8).reshape(len(piece), row_bytes), stored.type)
        return dense.reshape(shape)

    def norm_power(self, name: str) -> Tensor | None:
        """Return the power that the norm before a layer gives each input channel."""
        return self._names.norm_power(name, {key: key for key in self.tensors}, self.read)

    def parameters(self, name: str) -> list[str]:
        """Return the model's names of a tensor."""
        return self._names.parameters(name)

    def take_tokenizer(self, tokenizer: Any) -> None:
        """Put a tokenizer beside the packed weights, and calibrate with it."""
        self._beside.take_tokenizer(tokenizer)

    def open_model(self) -> OpenModel:
        """Load the whole model in float32."""
        return open_pretrained(_load_whole(self._path), self._beside.tokenizer)

    @property
    def beside(self) -> Mapping[str, str]:
        """SHA-256 of config, generation config and tokenizer, by the names of their files."""
        return self._beside.digests

    def complete_output(self, folder: Path, manifest: Manifest, dtype: torch.dtype | None) -> None:
        """Write config.json, and what else goes beside the weights."""
        self._beside.write(folder, manifest, dtype)


def _open_by_tensor(path: Path) -> Source | None:
    """Open a file so that its tensors are read one at a time, or return None where they cannot be."""
    import gguf
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    reader = gguf.GGUFReader(path)
    _require_blocks(path, reader)
    architecture = str(reader.fields["general.architecture"].contents())
    if converts_gguf_at_once(architecture) or reader.byte_order != "I":
        return None
    stored = {
        tensor.name: StoredTensor(
            tensor.tensor_type, tuple(map(int, reversed(tensor.shape))), int(tensor.data_offset), int(tensor.n_bytes)
        )
        for tensor in reader.tensors
    }
    del reader  # which maps the whole file
    config = gguf_config(str(path))
    known = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known, dtype=torch.float32)
    conversion = GGUFConversion(config, architecture, model)
    names = CheckpointNames(model)
    if (members := _members(stored, conversion, names)) is None:
        return None
    source = GGUFSource(path, stored, conversion, members, model)
    for tied, origin in names.tied.items():
        if tied in members:
            if not source.same(tied, origin):
                return None  # what becomes of them, loading decides
            del source.tensors[tied]
    return source


def _is_of_experts(name: str) -> bool:
    """Return whether a tensor of a file holds the matrices of all experts of a layer, along its first axis."""
    return name.endswith("_exps.weight")


def _members(
    stored: Mapping[str, StoredTensor], conversion: GGUFConversion, names: CheckpointNames
) -> dict[str, list[str]] | None:
    """Return the file's names of what each tensor of the model is made of, or None if they do not make up all of the model."""
    import gguf

    members: dict[str, list[str]] = defaultdict(list)
    for name in stored:
        target = conversion.names.get(name.removesuffix(".weight") if _is_of_experts(name) else name)
        if target is not None:
            members[target].append(name)
    for tied, origin in names.tied.items():
        if tied in members and origin not in members:
            members[origin] = members.pop(tied)
    if names.names - members.keys() - names.tied.keys() or members.keys() - set(names.names):
        return None
    for name, group in members.items():
        count = sum(math.prod(stored[member].shape) for member in group)
        if names.parameter(name) != (name, None) or count != math.prod(names.shape(name) or ()):
            return None
    for kind in {stored[member].type for group in members.values() for member in group}:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)  # or it is refused now
    return dict(members)


def _notes(stored: Iterable[StoredTensor]) -> list[str]:
    """Return the note on a file's types: "Q4_K, Q6_K, dequantised to F32"; none on floats."""
    kinds = sorted({tensor.type.name for tensor in stored} - set(FLOATS))
    return [f"{', '.join(kinds)}, dequantised to F32"] if kinds else []


def _load_whole(path: Path) -> Any:
    """Load a file's whole model in float32."""
    from transformers import AutoModelForCausalLM

    return load_complete(AutoModelForCausalLM, path.parent, path, gguf_file=path.name, dtype=torch.float32)


def _tokenizer(path: Path) -> Any:
    """Return the tokenizer that a file carries, or None: not every one can be converted, and the weights can be packed all the same."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception:
        return None


def _require_blocks(path: Path, reader: Any) -> None:
    """Refuse a file that names more blocks than it has tensors, before they are built."""
    for name, field in reader.fields.items():
        if name.endswith(".block_count") and int(field.contents()) > len(reader.tensors):
            raise ModelError(f"{path}: has {len(reader.tensors)} tensors for {field.contents()} blocks; fetch it again")
