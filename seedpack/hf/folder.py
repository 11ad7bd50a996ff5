"""Hugging Face folders: config.json says the architecture, the architecture says what each tensor is."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from seedpack._version import WRITER
from seedpack.converter.sources.base import FileState, OpenModel, Source, SourceTensor
from seedpack.converter.sources.dequantized import dequantized
from seedpack.converter.sources.safetensors import SafetensorsSource
from seedpack.converter.sources.state_dict import StateDictSource
from seedpack.converter.sources.torch_file import load_state_dict
from seedpack.converter.trust import trusting_remote_code, trusts_remote_code
from seedpack.dtypes import to_bytes
from seedpack.errors import FormatError, ModelError
from seedpack.formats import CheckpointWriter, Manifest
from seedpack.formats.files import is_file
from seedpack.formats.places import is_remote
from seedpack.formats.reader import read_json
from seedpack.formats.record import RECORD_FILE, file_digest
from seedpack.formats.writer import SINGLE_FILE
from seedpack.hf.checkpoint_names import CheckpointNames
from seedpack.hf.complete import require_complete, require_layers
from seedpack.hf.config import quantization_of
from seedpack.hf.converted import ConvertedSource
from seedpack.hf.language_model import open_folder_model
from seedpack.hf.quantization import FILES as QUANTIZATION_FILES
from seedpack.hf.quantization import block_sizes, dense_dtype, quantizations, require_read, without_quantization
from seedpack.hf.remote_code import names_of_folder
from seedpack.loader.save import raw_planned

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".th", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz"}


class FolderSource(Source):
    """A folder with config.json and weights, sharded or not.

    Args:
        path: the folder.
        files: the files of weights to read; default those that transformers reads unasked.
        names: of the model that these are for, where it is another one than config.json says: it may lack some of their tensors,
            and they some of its own.
        remote: the folder in remote storage whose weights these are, where `path` has all but them.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[Path] = (),
        names: CheckpointNames | None = None,
        remote: Path | None = None,
    ):
        config = read_config(path)
        documents = quantizations(config)
        require_read(documents, path)
        config = without_quantization(config)
        self._beside = {name: file_digest(path / name) for name in ["config.json", *_further_files(path)]}
        require_layers(path, config)
        self._path, self._remote, self._names = path, remote, names or names_of_folder(path, config)
        self._trust = trusts_remote_code()
        weights = _open_weights(path, self._names, files, remote or path)
        self._weights = dequantized(
            weights, self._names.kind, dense_dtype(config), block_sizes(documents), is_quantised=bool(documents)
        )
        self._is_dense = self._weights is weights
        stale = [] if self._is_dense else [name for name in self._beside if name in QUANTIZATION_FILES]
        for name in stale:
            del self._beside[name]
        stored = self._weights.named
        if names is None:
            require_complete(self._names, stored, str(remote or path))
        if any(self._names.converted_by(name) is not None for name in stored):
            self._weights = ConvertedSource(self._weights, self._names)
            self._names = self._names.restricted(self._weights.tensors)
        tensors, self._renamed, self._stored = _without_ties(self._weights, self._names)
        super().__init__(
            str(remote or path),
            tensors,
            config=config,
            dropped=[*self._weights.dropped, *stale],
            files=self._weights.files,
            notes=self._weights.notes,
        )

    @property
    def state(self) -> str:
        """Tells these tensors from others: by the files, and what makes tensors of them."""
        made_by = [self._weights.state, self._beside["config.json"], version("transformers")]
        return hashlib.sha256(json.dumps(made_by).encode()).hexdigest()

    def _read(self, name: str) -> Tensor:
        return self._weights._read(self._renamed.get(name, name))

    def require_unchanged(self) -> None:
        """Refuse weights, or files beside them, that were written to since they were opened."""
        super().require_unchanged()
        for name, digest in self._beside.items():
            path = self._path / name
            if not path.is_file() or file_digest(path) != digest:
                raise self._changed(path)

    def norm_power(self, name: str) -> Tensor | None:
        """Return the power that the norm before a layer gives each input channel [in]."""
        return self._names.norm_power(name, self._stored, self.read)

    def parameters(self, name: str) -> list[str]:
        """Return the model's names of a tensor."""
        return self._names.parameters(name)

    def open_model(self) -> OpenModel:
        """Open the model with its tokenizer: that of the folder itself, or where it is quantised or remote, of a dense copy."""
        with trusting_remote_code(self._trust):
            return self._open_model()

    def _open_model(self) -> OpenModel:
        if self._is_dense and self._remote is None:
            return open_folder_model(self._path)
        copy = tempfile.TemporaryDirectory(prefix="seedpack-dense-")
        with ExitStack() as stack:
            stack.callback(copy.cleanup)
            self._write_dense(Path(copy.name))
            opened = open_folder_model(Path(copy.name), self._path)
            weakref.finalize(opened.module, stack.pop_all().close)  # weights may stay on disk
        return opened

    def _write_dense(self, folder: Path) -> None:
        """Write the folder as a dense one, a tensor at a time."""
        assert self.config is not None
        planned = [raw_planned(name, tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()]
        with CheckpointWriter(folder / SINGLE_FILE, planned, {}, WRITER, manifest=False) as writer:
            for name in self.tensors:
                writer.write(name, {"weight": to_bytes(self.read(name))})
        _write_config(folder, self.config)
        copy_files(self._path, (name for name in self._beside if name != "config.json"), folder)

    @property
    def beside(self) -> Mapping[str, str]:
        """SHA-256 of the folder's other files, by name."""
        return self._beside

    def complete_output(self, folder: Path, manifest: Manifest, dtype: torch.dtype | None) -> None:
        """Copy the files beside the weights, and write config.json."""
        assert self.config is not None
        write_packed_config(folder, self.config, manifest, dtype)
        copy_files(self._path, (name for name in self._beside if name != "config.json"), folder)


def read_config(path: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        ModelError: there is none.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{path}: has no config.json; pass the weight file itself, or a Hugging Face folder")
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise ModelError(f"{config_file}: expected a JSON object")
    return config


def write_packed_config(folder: Path, config: dict[str, Any], manifest: Manifest, dtype: torch.dtype | None) -> None:
    """Write a packed model's config.json: the dense one, with the manifest of its packed tensors."""
    config = {**config, "quantization_config": quantization_of(manifest.packed_only())}
    if dtype is not None:
        config = {key: value for key, value in config.items() if key != "torch_dtype"}
        config["dtype"] = str(dtype).removeprefix("torch.")
    _write_config(folder, config)


def copy_files(source: Path, names: Iterable[str], folder: Path) -> None:
    """Copy files into a folder, by their relative names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def complete_dense_folder(packed: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Write what a folder needs beside the weights that were unpacked: further files, and a config of a dense model."""
    copy_files(packed, ["config.json", *_further_files(packed)], folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise FormatError(f"{packed / 'config.json'}: expected a JSON object")
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict):
            holder.pop("quantization_config", None)
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    _write_config(folder, config)


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _open_weights(path: Path, names: CheckpointNames, files: Sequence[Path], place: Path) -> Source:
    """Open the weights of a folder by their own names."""
    if not files:
        old = [] if is_remote(place) else _weight_files(path, "pytorch_model.bin", place)
        files = _weight_files(path, SINGLE_FILE, place) or old
    if not files:
        wanted = f"no {SINGLE_FILE}" if is_remote(place) else f"neither {SINGLE_FILE} nor pytorch_model.bin"
        raise ModelError(f"{place}: holds {wanted}, nor an index of shards")
    if all(file.suffix == ".safetensors" for file in files):
        return SafetensorsSource(files, str(place), names.kind)
    states, state = FileState.of_all(files), dict[str, Tensor]()
    for file in files:
        state |= load_state_dict(file)[0]
    # names that share a storage are left out: transformers ties by its config
    return StateDictSource(str(path), state, names.kind, files=states)


def _without_ties(
    source: Source, names: CheckpointNames
) -> tuple[dict[str, SourceTensor], dict[str, str], dict[str, str]]:
    """Keep one tensor for each set of tied ones, under the name that transformers reads it from.

    Returns:
        The tensors, {name: the name in the files} where they differ, and {the model's name: the tensor's}.
    """
    tensors = dict(source.tensors)
    stored = {names.parameter(name)[0]: name for name in tensors}
    renamed: dict[str, str] = {}
    for target, origin in names.tied.items():
        if target not in stored:
            continue
        name = stored[target]
        if origin not in stored:
            info = tensors[name]
            tensors[origin] = replace(info, **names.kind(origin, info.shape)._asdict())
            renamed[origin] = stored[origin] = name
        elif not source.same(renamed.get(stored[origin], stored[origin]), name):
            raise ModelError(
                f"{source.name}: the config ties {name!r} to {stored[origin]!r}, but their values differ; "
                'set "tie_word_embeddings": false in config.json'
            )
        del tensors[name]
    return tensors, renamed, stored


def _weight_files(path: Path, single: str, place: Path) -> list[Path]:
    """Return a folder's file of weights, or its shards, where they lie; none where there is neither."""
    index = path / f"{single}.index.json"
    if not index.is_file():
        return [place / single] if (place / single).is_file() else []
    document = read_json(index)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not is_file(place / name):
            raise ModelError(f"{index}: names the shard {name[:120]!r}, which is not in the folder")
    return [place / name for name in names]


def _further_files(path: Path) -> list[str]:
    """Return the relative names of the files beside the weights that a folder made of this one should keep."""
    names = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    kept = [name for name in beside_weights(names, sentence_modules(path)) if name != "config.json"]
    for name in kept:
        _require_no_way_out(path, name)
    return kept


def beside_weights(names: Iterable[PurePath], modules: Sequence[str]) -> list[str]:
    """Return which of a folder's files are not its weights, nor an index of them.

    Subfolders come along: of processors, chat templates, and of sentence-transformers' modules, with the weights of these.

    Args:
        names: relative to the folder.
        modules: as `sentence_modules` returns them.
    """

    def is_kept(name: PurePath) -> bool:
        if len(name.parts) == 1 and (name.name == RECORD_FILE or name.name.endswith(".index.json")):
            return False
        is_weights = name.suffix.lower() in WEIGHT_SUFFIXES and not any(
            name.is_relative_to(module) for module in modules
        )
        return not is_weights and not any(part.startswith(".") for part in name.parts)

    return sorted(name.as_posix() for name in names if is_kept(name))


def _require_no_way_out(path: Path, name: str) -> None:
    """Refuse a link out of a folder: what it leads to would be copied. In the hub's cache all files are links to its blobs."""
    file = (path / name).resolve()
    if not file.is_relative_to(path.resolve()) and file.parent.name != "blobs":
        raise ModelError(
            f"{path / name}: is a link out of the folder, so that another file would be copied; replace it by a copy"
        )


def sentence_modules(path: Path) -> list[str]:
    """Return the subfolders of the modules that follow a model of sentence-transformers."""
    with suppress(FormatError):
        modules = read_json(path / "modules.json")
        if isinstance(modules, list):
            return [str(module["path"]) for module in modules if isinstance(module, dict) and module.get("path")]
    return []
