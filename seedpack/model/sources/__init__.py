"""Where weights come from: state-dict files, safetensors, Hugging Face folders, GGUF files, hub ids, live modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from seedpack.errors import ModelError
from seedpack.model.sources.base import Source as Source
from seedpack.model.sources.base import StateDictSource

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
        from seedpack.model.sources.live import from_module

        return from_module(model)
    if isinstance(model, Mapping):
        return StateDictSource.from_tensors("state dict", dict(model))
    path = Path(model)
    suffix = path.suffix.lower()
    if len(path.name) > 255 or "\0" in str(path):
        raise ModelError(f"{str(path)[:80]!r}: is no path")
    if path.is_dir():
        from seedpack.model.sources.folder import open_folder

        return open_folder(path)
    if path.is_file():
        if suffix in TORCH_SUFFIXES:
            from seedpack.model.sources.torch_file import open_torch_file

            return open_torch_file(path)
        if suffix == ".gguf":
            from seedpack.model.sources.gguf import open_gguf

            return open_gguf(path)
        if suffix == ".safetensors":
            from seedpack.model.sources.safetensors import open_safetensors

            return open_safetensors([path])
        known = ", ".join(sorted(TORCH_SUFFIXES | {".gguf", ".safetensors"}))
        raise ModelError(f"{path}: unknown kind of file {suffix!r}; known: {known}, or a Hugging Face folder")
    if looks_like_hub_id(str(model)):
        from seedpack.model.sources.hub import download

        return open_source(download(str(model)))
    raise ModelError(f"{model}: no such file or folder, and not a hub id (org/name)")


def looks_like_hub_id(text: str) -> bool:
    """Whether a text that is no path can be "org/name"."""
    parts = text.split("/")
    return len(parts) == 2 and all(part and not part.startswith(".") for part in parts) and not Path(parts[0]).exists()
