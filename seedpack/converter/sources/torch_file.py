"""State dicts saved by torch.save, read without ever unpickling code."""

from __future__ import annotations

import hashlib
import pickle  # noqa: TID251 (its error class; torch.load raises it)
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedpack.converter.sources.base import FileState, Source
from seedpack.converter.sources.state_dict import StateDictSource
from seedpack.errors import ModelError, first_line
from seedpack.formats.foreign import COMPRESSIBLE, first_bytes, foreign_kind

NESTED = ("state_dict", "model", "model_state_dict", "module")


def load_state_dict(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Read the state dict of a file, and the names of what else it held.

    Args:
        path: the file.
        key: that it is under, or keys with dots between them; by default it is sought under `state_dict`, `model` and the like.
    """
    loaded = _load(path)
    if not isinstance(loaded, Mapping):
        raise ModelError(
            f"{path}: holds a {type(loaded).__name__}, not a state dict; save it with torch.save(model.state_dict(), …)"
        )
    outer = loaded
    if key is not None:
        outer = loaded = _under(loaded, key, path)
    else:
        loaded = next((outer[name] for name in NESTED if isinstance(outer.get(name), Mapping)), loaded)
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    if odd := [key for key in tensors if not isinstance(key, str)]:
        raise ModelError(
            f"{path}: a tensor has the key {odd[0]!r}, which is no name; save the state dict with strings for keys"
        )
    if not tensors:
        places = f"under {key!r}" if key else f"under {', '.join(NESTED)} or at its top"
        raise ModelError(
            f"{path}: holds no tensors {places}, where it has {[str(name)[:40] for name in outer][:6]}; say which of them is "
            "the state dict (--state-key, state_key=…)"
        )
    dropped = [str(name) for name in outer if outer[name] is not loaded and not isinstance(outer[name], Tensor)]
    if loaded is not outer:
        dropped += [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]
    return tensors, dropped


def _under(loaded: Mapping[Any, object], key: str, path: Path) -> Mapping[Any, Any]:
    """Return what is under a key, or keys with dots between them."""
    for name in [key] if key in loaded else key.split("."):
        found = loaded.get(name)
        if not isinstance(found, Mapping):
            raise ModelError(f"{path}: has no state dict under {name!r}; it has {[str(k)[:40] for k in loaded][:6]}")
        loaded = found
    return loaded


def open_torch_file(path: Path, key: str | None = None) -> Source:
    """Open the state dict of one file, which may be under a key."""
    files = FileState.of_all([path])
    tensors, dropped = load_state_dict(path, key)
    return _TorchFileSource(str(path), tensors, dropped=dropped, files=files, key=key)


class _TorchFileSource(StateDictSource):
    def __init__(self, *args: Any, key: str | None, **more: Any):
        super().__init__(*args, **more)
        self._key = key

    @property
    def state(self) -> str:
        """Tells these tensors from others: a file may hold several state dicts."""
        return hashlib.sha256(f"{super().state} {self._key}".encode()).hexdigest()


def _load(path: Path) -> object:
    _require_not_deflated(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is an error
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it refers to {found[1]}" if found else "it is not a plain state dict"
        raise ModelError(
            f"{path}: refused, because loading it could run code ({what}); "
            "load it where you trust it and save the weights alone with torch.save(model.state_dict(), …)"
        ) from None
    except Exception as error:  # the reader meets foreign bytes: whatever it raises, they are no state dict
        raise _not_torch(path, error) from None


def _require_not_deflated(path: Path) -> None:
    """Refuse an archive with compressed entries, which torch would inflate without a limit; it never writes one itself."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return  # none, or broken: torch says so
    if packed:
        raise ModelError(
            f"{path}: its entry {packed[0][:80]!r} is compressed, which torch.save never does; load it where you trust it, and save it "
            "again with torch.save"
        )


def _not_torch(path: Path, error: Exception) -> ModelError:
    if "TorchScript" in str(error):
        remedy = "save the weights alone with torch.save(torch.jit.load(…).state_dict(), …)"
        return ModelError(f"{path}: is a TorchScript archive, which holds code; {remedy}")
    kind = foreign_kind(first_bytes(path))
    if kind and kind not in COMPRESSIBLE.values():
        return ModelError(f"{path}: is {kind}, not a file written by torch.save")
    why = first_line(error)
    return ModelError(f"{path}: not a file written by torch.save{f' ({why})' if re.search('[a-z]{3}', why) else ''}")
