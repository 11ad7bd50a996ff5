"""Where weights come from: state-dict files, safetensors, Hugging Face folders, GGUF files, hub ids, live modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from seedpack.converter.sources.base import Source, StateDictSource
from seedpack.converter.sources.live import from_module
from seedpack.converter.sources.registry import opener_of, registered_suffixes
from seedpack.converter.sources.safetensors import open_safetensors
from seedpack.converter.sources.torch_file import open_torch_file
from seedpack.errors import ModelError

TORCH_SUFFIXES = {".pt", ".pth", ".th", ".bin", ".ckpt"}


def open_source(model: str | Path | nn.Module | Mapping[str, Tensor]) -> Source:
    """The source of a model.

    Args:
        model: a `.pt/.pth/.th/.bin/.ckpt` state dict, a `.safetensors` or `.gguf` file, a Hugging Face folder, a hub
            id such as "org/name", a live module, or a state dict.

    Raises:
        ModelError: nothing of that kind is there, with what was looked for.
    """
    if isinstance(model, nn.Module):
        return from_module(model)
    if isinstance(model, Mapping):
        return StateDictSource.from_tensors("state dict", dict(model))
    path = Path(model)
    suffix = path.suffix.lower()
    if len(path.name) > 255 or "\0" in str(path):
        raise ModelError(f"{str(path)[:80]!r}: is no path")
    if path.is_dir() and (open_folder := opener_of("folder")):
        return open_folder(path)  # type: ignore[no-any-return]
    if path.is_file():
        if suffix in TORCH_SUFFIXES:
            return open_torch_file(path)
        if suffix == ".safetensors":
            return open_safetensors([path])
        if open_file := opener_of(suffix):
            return open_file(path)  # type: ignore[no-any-return]
        known = ", ".join(sorted(TORCH_SUFFIXES | {".safetensors"} | registered_suffixes()))
        raise ModelError(f"{path}: unknown kind of file {suffix!r}; known: {known}, or a Hugging Face folder")
    if looks_like_hub_id(str(model)) and (download := opener_of("hub")):
        return open_source(download(str(model)))
    raise ModelError(f"{model}: no such file or folder, and not a hub id (org/name)")


def looks_like_hub_id(text: str) -> bool:
    """Whether a text that is no path can be "org/name"."""
    parts = text.split("/")
    return len(parts) == 2 and all(part and not part.startswith(".") for part in parts) and not Path(parts[0]).exists()
