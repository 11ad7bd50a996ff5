"""GGUF files, through transformers: dequantised, with the config and the tokenizer that the file carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from seedpack.errors import ModelError, first_line
from seedpack.hf.complete import load_complete
from seedpack.hf.pretrained import PretrainedSource


class GGUFSource(PretrainedSource):
    """A GGUF file, whose whole model is dequantised to float32 in memory."""

    def __init__(self, path: Path):
        super().__init__(_open_dense(path), str(path))
        self.input_bytes = path.stat().st_size
        if (tokenizer := _tokenizer(path)) is None:
            self.dropped.append("its tokenizer, which transformers cannot convert,")
        else:
            self.take_tokenizer(tokenizer)


def _tokenizer(path: Path) -> Any:
    """Return the tokenizer that a file carries, or None: not every one can be converted, and the weights can be packed all the same."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception:
        return None


def _open_dense(path: Path) -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{path}: reading GGUF needs gguf; pip install gguf")
    from transformers import AutoModelForCausalLM

    try:
        _require_blocks(path)
        return load_complete(AutoModelForCausalLM, path.parent, path, gguf_file=path.name, dtype=torch.float32)
    except ModelError:
        raise
    except Exception as error:  # the parser meets foreign bytes: whatever it raises, they are no model
        raise ModelError(f"{path}: transformers cannot read it ({first_line(error)})") from error


def _require_blocks(path: Path) -> None:
    """Refuse a file that names more blocks than it has tensors, before they are built."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    for name, field in reader.fields.items():
        if name.endswith(".block_count") and int(field.contents()) > len(reader.tensors):
            raise ModelError(f"{path}: has {len(reader.tensors)} tensors for {field.contents()} blocks; fetch it again")
