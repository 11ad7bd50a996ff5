"""State dicts saved by torch.save, read without ever unpickling code."""

from __future__ import annotations

import pickle  # noqa: TID251 (its error class; torch.load raises it)
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from seedpack.converter.sources.base import FileState, Source
from seedpack.converter.sources.state_dict import StateDictSource
from seedpack.errors import ModelError, first_line

NESTED = ("state_dict", "model", "model_state_dict", "module")


def load_state_dict(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the state dict of a file (also nested under `state_dict` or `model`), and the names of what else it held."""
    loaded = _load(path)
    if not isinstance(loaded, Mapping):
        raise ModelError(
            f"{path}: holds a {type(loaded).__name__}, not a state dict; save it with torch.save(model.state_dict(), …)"
        )
    outer = loaded
    for key in NESTED:
        if isinstance(outer.get(key), Mapping):
            loaded = outer[key]
            break
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    if odd := [key for key in tensors if not isinstance(key, str)]:
        raise ModelError(
            f"{path}: a tensor has the key {odd[0]!r}, which is no name; save the state dict with strings for keys"
        )
    if not tensors:
        raise ModelError(
            f"{path}: holds no tensors under {', '.join(NESTED)} or at its top, where it has {[str(k)[:40] for k in outer][:6]}; "
            "save the state dict itself"
        )
    dropped = [str(key) for key in outer if outer[key] is not loaded and not isinstance(outer[key], Tensor)]
    if loaded is not outer:
        dropped += [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    return tensors, dropped


def open_torch_file(path: Path) -> Source:
    """Open the state dict of one file."""
    files = FileState.of_all([path])
    tensors, dropped = load_state_dict(path)
    return StateDictSource(str(path), tensors, dropped=dropped, files=files)


def _load(path: Path) -> object:
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
        raise ModelError(f"{path}: not a file written by torch.save ({first_line(error)})") from None
