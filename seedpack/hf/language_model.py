"""transformers models that can run: opened from a folder or live, with their decoder layers and what writes their text."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch

from seedpack.converter.sources.base import OpenModel
from seedpack.converter.trust import trusts_remote_code
from seedpack.errors import ModelError, first_line
from seedpack.formats.reader import read_json
from seedpack.hf.complete import load_complete
from seedpack.hf.internals import decoder_layers
from seedpack.hf.own_text import generate_tokens
from seedpack.hf.remote_code import model_class
from seedpack.hf.tasks import LANGUAGE, load_for_task, load_processor
from seedpack.memory import free_bytes


def open_pretrained(model: Any, tokenizer: Any = None) -> OpenModel:
    """Return a transformers model with what calibration on text needs."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not hasattr(model, "generate") or head is None or model.config.is_encoder_decoder:
        return OpenModel(model, tokenizer)
    return OpenModel(model, tokenizer, tuple(decoder_layers(model)), generate_tokens)


def open_folder_model(path: Path, where: Path | None = None) -> OpenModel:
    """Open a folder's model, in float32, and its tokenizer; on disk where it fills more than half of what is free.

    Args:
        path: the folder.
        where: it is a copy of, for messages.
    """
    config = read_json(path / "config.json")
    cls = model_class(path, config)
    files = list(path.glob("*.safetensors")) or list(path.glob("*.bin"))
    size = sum(file.stat().st_size for file in files)
    options: dict[str, Any] = {"dtype": torch.float32}
    trusted = {"trust_remote_code": True} if trusts_remote_code() else {}
    holder = None
    if 2 * size > free_bytes() / 2:
        holder = tempfile.TemporaryDirectory(prefix="seedpack-")
        options = {"dtype": "auto", "device_map": {"": "disk"}, "offload_folder": holder.name}
    try:
        model = load_complete(cls, path, where or path, **options, **trusted)
    except ModelError:
        raise
    except Exception as error:  # the libraries' own
        raise ModelError(f"{where or path}: transformers cannot run it ({first_line(error)})") from error
    if holder is not None:
        weakref.finalize(model, holder.cleanup)
    return open_pretrained(model, tokenizer_of(path))


def load_language_model(path: str | Path, dtype: torch.dtype | str = torch.float32) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a folder (dense or packed), a GGUF file or a hub id."""
    return load_for_task(path, LANGUAGE, dtype), load_processor(path, LANGUAGE)


def tokenizer_of(path: Path) -> Any:
    """Return a folder's tokenizer, or None: not every model has one."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trusts_remote_code())
    except Exception:  # transformers fails in many ways where files are missing
        return None
