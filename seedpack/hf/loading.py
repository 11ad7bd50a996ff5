"""Packed folder -> transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from seedpack.converter.trust import trusting_remote_code
from seedpack.errors import ModelError, SeedpackError, first_line
from seedpack.formats import Checkpoint
from seedpack.formats.reader import read_json
from seedpack.hf.complete import load_complete, require_layers
from seedpack.hf.remote_code import model_class


def load_pretrained(path: Path, dtype: torch.dtype | str = "auto", **options: Any) -> Any:
    """Load a packed Hugging Face folder, whose layers stay packed, by transformers' own `from_pretrained`.

    Args:
        path: the folder.
        dtype: of the computation; "auto" is the model's.
        options: passed on (device_map, …).

    Raises:
        ModelError: transformers cannot load it.
    """
    config = read_json(path / "config.json")
    Checkpoint(path).close()  # headers and manifest are checked before transformers reads anything
    require_layers(path, config)
    with trusting_remote_code(bool(options.get("trust_remote_code"))):
        cls = model_class(path, config)
    try:
        return load_complete(cls, path, path, dtype=dtype, **options)
    except (SeedpackError, OSError, MemoryError):
        raise
    except Exception as error:  # transformers' own
        raise ModelError(f"{path}: transformers cannot load it ({first_line(error)})") from error
