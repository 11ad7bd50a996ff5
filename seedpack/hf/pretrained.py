"""transformers models in memory: what is packed becomes a folder, with config, generation config and tokenizer."""

from __future__ import annotations

import copy
import json
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.converter.sources.base import OpenModel
from seedpack.converter.sources.module import ModuleSource, require_dense
from seedpack.converter.sources.state_dict import StateDictSource
from seedpack.errors import ModelError
from seedpack.formats import Manifest
from seedpack.hf.checkpoint_names import CheckpointNames
from seedpack.hf.folder import copy_files, write_packed_config
from seedpack.hf.language_model import open_pretrained, tokenizer_of
from seedpack.hf.quantization import strip_quantization


class PretrainedSource(StateDictSource):
    """A transformers model in memory, under its own names; tied parameters are left out, as transformers ties them again.

    Args:
        model: the model.
        name: for messages.
    """

    def __init__(self, model: Any, name: str = ""):
        require_dense(model)
        self._model, self._tokenizer = model, None
        self._folder = tempfile.TemporaryDirectory(prefix="seedpack-beside-")
        weakref.finalize(self, self._folder.cleanup)
        self._save_beside()
        names = CheckpointNames(model)
        with torch.device("meta"):
            self._names = CheckpointNames(type(model)(model.config))
        state = {key: tensor for key, tensor in model.state_dict().items() if key not in names.tied}
        super().__init__(name or type(model).__name__, state, names.restricted(state).kind)
        config: dict[str, Any] = json.loads((self._beside / "config.json").read_text())
        self.config = {**config, "architectures": [type(model).__name__]}

    @property
    def _beside(self) -> Path:
        return Path(self._folder.name)

    def _save_beside(self) -> None:
        config = copy.deepcopy(self._model.config)
        strip_quantization(config)
        config.save_pretrained(self._beside)
        if self._model.can_generate():
            self._model.generation_config.save_pretrained(self._beside)

    def take_tokenizer(self, tokenizer: Any) -> None:
        """Put a tokenizer, or a processor, beside the packed weights, and calibrate with it."""
        if not hasattr(tokenizer, "save_pretrained"):
            raise ModelError(f"tokenizer: expected one of transformers, got a {type(tokenizer).__name__}")
        tokenizer.save_pretrained(self._beside)
        self._tokenizer = tokenizer

    def norm_power(self, name: str) -> Tensor | None:
        """Return the power that the norm before a layer gives each input channel."""
        return self._names.norm_power(name, {key: key for key in self._state}, self.read)

    def parameters(self, name: str) -> list[str]:
        """Return the model's names of a tensor."""
        return self._names.parameters(name)

    def open_model(self) -> OpenModel:
        """Return the model itself, ready to be calibrated on text where it is a causal language model."""
        return open_pretrained(self._model, self._tokenizer or tokenizer_of(self._beside))

    def complete_output(self, folder: Path, manifest: Manifest, dtype: torch.dtype | None) -> None:
        """Write config.json, and what else was saved beside the weights."""
        assert self.config is not None
        write_packed_config(folder, self.config, manifest, dtype)
        copy_files(self._beside, (file.name for file in self._beside.iterdir() if file.name != "config.json"), folder)


class _PretrainedModule(ModuleSource):
    """A transformers model that becomes a single file, to fill the same model with."""

    def open_model(self) -> OpenModel:
        return open_pretrained(self._module)


def open_live(model: nn.Module, as_file: bool) -> StateDictSource:
    """Return the source of a live model that can save itself.

    Args:
        model: of transformers; any other (of diffusers, peft) is a module like others.
        as_file: it becomes a file, not a folder.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return ModuleSource(model)
    return _PretrainedModule(model) if as_file else PretrainedSource(model)
