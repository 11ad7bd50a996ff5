"""The one door to all sources."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from seedpack.converter.sources.base import FileState, Source
from seedpack.converter.sources.dequantized import dequantized
from seedpack.converter.sources.module import ModuleSource
from seedpack.converter.sources.paths import looks_like_hub_id as looks_like_hub_id
from seedpack.converter.sources.registry import opener_of, registered_suffixes
from seedpack.converter.sources.safetensors import SafetensorsSource
from seedpack.converter.sources.state_dict import StateDictSource
from seedpack.converter.sources.torch_file import open_torch_file
from seedpack.errors import ModelError
from seedpack.formats.places import is_remote, place, reaching

TORCH_SUFFIXES = {".pt", ".pth", ".th", ".bin", ".ckpt"}
Model = str | Path | nn.Module | Mapping[str, Tensor] | Source


def open_source(model: Model, *, as_file: bool = False, state_key: str | None = None) -> Source:
    """Open the source of a model.

    Args:
        model: a `.pt/.pth/.th/.bin/.ckpt` state dict, a `.safetensors` or `.gguf` file, a Hugging Face folder, a hub
            id such as "org/name", the address of a file or folder in remote storage ("s3://…", "hf://…", "https://…"), a live
            module, a state dict, or a source, which is returned as it is.
        as_file: a live transformers model becomes a single file, not a folder.
        state_key: of a file that torch saved, the key of the state dict in it.

    Raises:
        ModelError: nothing of that kind is there, with what was looked for.
    """
    if isinstance(model, Source):
        return model
    if isinstance(model, nn.Module):
        open_live = opener_of("pretrained") if hasattr(model, "save_pretrained") else None
        return open_live(model, as_file) if open_live else ModuleSource(model)
    if isinstance(model, Mapping):
        return dequantized(StateDictSource("state dict", model))
    if not isinstance(model, (str, os.PathLike)):
        raise ModelError(f"a model is a path, a hub id, a module or a state dict, got {_kind(model)}")
    if is_remote(str(model)):
        return _open_remote(place(model), state_key)
    path = place(model) if isinstance(model, str) else Path(model)
    if len(path.name) > 255 or "\0" in str(path):
        raise ModelError(f"{str(path)[:80]!r}: not a valid path")
    if path.is_dir() and (open_folder := opener_of("folder")):
        return open_folder(path)  # type: ignore[no-any-return]
    if path.is_file():
        return _open_file(path, state_key)
    if looks_like_hub_id(str(model)) and (download := opener_of("hub")):
        return open_source(download(str(model)))
    raise ModelError(f"{model}: no such file or folder, and not a hub id (org/name)")


def _open_remote(path: Path, state_key: str | None) -> Source:
    """Open what lies in remote storage: folders and safetensors are read there, other files are fetched."""
    suffix = path.suffix.lower()
    if suffix not in TORCH_SUFFIXES | {".safetensors"} | registered_suffixes():
        open_folder = opener_of("remote")
        if open_folder is None:
            raise ModelError(f"{path}: no opener of folders in remote storage is known; import seedpack.hf")
        return open_folder(path)  # type: ignore[no-any-return]
    if suffix == ".safetensors":
        return dequantized(SafetensorsSource([path]))
    remote: Any = path
    folder = tempfile.TemporaryDirectory(prefix="seedpack-remote-")
    try:
        with reaching(path):
            remote.fs.get_file(remote.path, f"{folder.name}/{path.name}")
        source = _open_file(Path(folder.name) / path.name, state_key)
    except BaseException:
        folder.cleanup()
        raise
    source.name, source.files = str(path), {path: FileState.of(path)}
    source.notes.append(f"fetched whole: of remote files only safetensors can be read in parts ({path.name})")
    weakref.finalize(source, folder.cleanup)
    return source


def _kind(model: object) -> str:
    return (
        f"the class {model.__name__}; make an object of it" if isinstance(model, type) else f"a {type(model).__name__}"
    )


def _open_file(path: Path, state_key: str | None) -> Source:
    suffix = path.suffix.lower()
    if suffix in TORCH_SUFFIXES:
        return dequantized(open_torch_file(path, state_key))
    if state_key is not None:
        raise ModelError(f"{path}: a state key is for files that torch saved ({', '.join(sorted(TORCH_SUFFIXES))})")
    if suffix == ".safetensors":
        return dequantized(SafetensorsSource([path]))
    if open_registered := opener_of(suffix):
        return open_registered(path)  # type: ignore[no-any-return]
    known = ", ".join(sorted(TORCH_SUFFIXES | {".safetensors"} | registered_suffixes()))
    raise ModelError(f"{path}: unknown kind of file {suffix!r}; known: {known}, or a Hugging Face folder")
