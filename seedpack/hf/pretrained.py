"""transformers models in memory: what is packed becomes a folder, with config, generation config and tokenizer."""

from __future__ import annotations

import copy
import json
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.converter.sources.base import OpenModel
from seedpack.converter.sources.module import ModuleSource, require_dense
from seedpack.converter.sources.state_dict import StateDictSource
from seedpack.dtypes import find_shared
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
        state = _stored_once(model, names.tied)
        self._require_own_form(state)
        super().__init__(name or type(model).__name__, state, names.restricted(state).kind)
        config: dict[str, Any] = json.loads((self._beside / "config.json").read_text())
        self.config = {**config, "architectures": [type(model).__name__]}

    @property
    def _beside(self) -> Path:
        return Path(self._folder.name)

    def _save_beside(self) -> None:
        config = copy.deepcopy(self._model.config)
        strip_quantization(config)
        config.dtype = self._model.dtype
        config.save_pretrained(self._beside)
        if self._model.can_generate():  # as it is: saving it by its own method refuses some that models come with
            self._model.generation_config.to_json_file(self._beside / "generation_config.json")

    def _require_own_form(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a model that has other tensors than its config makes: a folder of it could not be loaded."""
        cls, names = type(self._model).__name__, self._names
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        own = {name: names.shape(name) for name in names.names if name in found or name not in names.tied}
        if wrong := sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name)):
            raise ModelError(
                f"{cls}: {wrong[0]!r} is {_form(found, wrong[0])}, and by its config {_form(own, wrong[0])}; a folder of it could not "
                "be loaded: merge adapters first (merge_and_unload()), correct the config, or name a file to fill this model with "
                "(packed.safetensors)"
            )

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


def _form(shapes: Mapping[str, tuple[int, ...] | None], name: str) -> str:
    return f"a tensor {list(shapes[name] or ())}" if name in shapes else "not there"


def _stored_once(model: Any, tied: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the state of a model without what its config ties; what it shares beyond that is written twice.

    Raises:
        ModelError: the config ties tensors that differ.
    """
    state: dict[str, Tensor] = model.state_dict()
    for name, origin in tied.items():
        if name in state and origin in state:
            a, b = state.pop(name), state[origin]
            if a.data_ptr() != b.data_ptr() and not torch.equal(a, b):
                raise ModelError(
                    f"{type(model).__name__}: its config ties {name!r} to {origin!r}, but their values differ; set "
                    "model.config.tie_word_embeddings = False"
                )
    return state | {name: state[name].clone() for name in find_shared(state.items())}


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

    inner = getattr(model, "_orig_mod", model)  # torch.compile's
    if isinstance(inner, PreTrainedModel):
        model = inner
    if not isinstance(model, PreTrainedModel):
        return ModuleSource(model)
    return _PretrainedModule(model) if as_file else PretrainedSource(model)
