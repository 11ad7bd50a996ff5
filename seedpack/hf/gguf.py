"""GGUF files, through transformers: dequantised, with the config and the tokenizer that the file carries."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedpack.converter.sources.base import OpenModel
from seedpack.converter.sources.state_dict import StateDictSource
from seedpack.errors import ModelError, first_line
from seedpack.formats import Manifest
from seedpack.hf.checkpoint_names import CheckpointNames
from seedpack.hf.complete import load_complete
from seedpack.hf.folder import copy_files, write_packed_config
from seedpack.hf.language_model import open_pretrained, tokenizer_of


class GGUFSource(StateDictSource):
    """A GGUF file, whose whole model is dequantised to float32 in memory."""

    def __init__(self, path: Path):
        self._model = _open_dense(path)
        self._folder = tempfile.TemporaryDirectory(prefix="seedpack-gguf-")
        weakref.finalize(self, self._folder.cleanup)
        has_tokenizer = self._save_beside(path, Path(self._folder.name))
        names = CheckpointNames(self._model)
        with torch.device("meta"):
            self._names = CheckpointNames(type(self._model)(self._model.config))
        state = {name: tensor for name, tensor in self._model.state_dict().items() if name not in names.tied}
        dropped = [] if has_tokenizer else ["its tokenizer, which transformers cannot convert,"]
        super().__init__(str(path), state, names.restricted(state).kind, dropped=dropped)
        config: dict[str, Any] = json.loads((Path(self._folder.name) / "config.json").read_text())
        self.config = {**config, "architectures": [type(self._model).__name__]}

    def norm_power(self, name: str) -> Tensor | None:
        """Return the power that the norm before a layer gives each input channel [in]."""
        return self._names.norm_power(name, {key: key for key in self._state}, self.read)

    def parameters(self, name: str) -> list[str]:
        """Return the model's names of a tensor."""
        return self._names.parameters(name)

    def open_model(self) -> OpenModel:
        """Return the dequantised model and its tokenizer."""
        return open_pretrained(self._model, tokenizer_of(Path(self._folder.name)))

    def complete_output(self, folder: Path, manifest: Manifest, dtype: torch.dtype | None) -> None:
        """Write config.json, the generation config, and the tokenizer where it can be converted."""
        assert self.config is not None
        write_packed_config(folder, self.config, manifest, dtype)
        source = Path(self._folder.name)
        copy_files(source, (file.name for file in source.iterdir() if file.name != "config.json"), folder)

    def _save_beside(self, path: Path, folder: Path) -> bool:
        """Save what the file carries beside weights; return whether its tokenizer could be converted."""
        from transformers import AutoTokenizer

        if hasattr(self._model.config, "quantization_config"):
            del self._model.config.quantization_config
        self._model.config.save_pretrained(folder)
        if self._model.can_generate():
            self._model.generation_config.save_pretrained(folder)
        try:
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
        except Exception:  # not every tokenizer can be converted; the weights can be packed all the same
            return False
        return True


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
