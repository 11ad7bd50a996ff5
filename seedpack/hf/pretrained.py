"""transformers models in memory: what is packed becomes a folder, with config, generation config and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.converter.sources.base import OpenModel
from seedpack.converter.sources.module import ModuleSource, device_of, put_back, require_dense
from seedpack.converter.sources.state_dict import StateDictSource
from seedpack.dtypes import find_shared
from seedpack.errors import ModelError
from seedpack.formats import Manifest
from seedpack.hf.beside import Beside
from seedpack.hf.checkpoint_names import CheckpointNames
from seedpack.hf.language_model import open_pretrained


class PretrainedSource(StateDictSource):
    """A transformers model in memory, under its own names; tied parameters are left out, as transformers ties them again.

    Args:
        model: the model.
        name: for messages.
    """

    def __init__(self, model: Any, name: str = ""):
        require_dense(model)
        self._model, self._device, self._beside = model, device_of(model), Beside(model)
        names = CheckpointNames(model)
        with torch.device("meta"):
            self._names = CheckpointNames(type(model)(model.config))
        state = _stored_once(model, names.tied)
        self._require_own_form(state)
        super().__init__(name or type(model).__name__, state, names.restricted(state).kind)
        self.config = self._beside.config

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
        self._beside.take_tokenizer(tokenizer)

    def norm_power(self, name: str) -> Tensor | None:
        """Return the power that the norm before a layer gives each input channel."""
        return self._names.norm_power(name, {key: key for key in self._state}, self.read)

    def parameters(self, name: str) -> list[str]:
        """Return the model's names of a tensor."""
        return self._names.parameters(name)

    def open_model(self) -> OpenModel:
        """Return the model itself, ready to be calibrated on text where it is a causal language model."""
        return open_pretrained(self._model, self._beside.tokenizer)

    def give_back(self) -> None:
        """Put the model back on its device."""
        put_back(self._model, self._device)

    @property
    def beside(self) -> Mapping[str, str]:
        """SHA-256 of config, generation config and tokenizer, by the names of their files."""
        return self._beside.digests

    def complete_output(self, folder: Path, manifest: Manifest, dtype: torch.dtype | None) -> None:
        """Write config.json, and what else was saved beside the weights."""
        self._beside.write(folder, manifest, dtype)


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
