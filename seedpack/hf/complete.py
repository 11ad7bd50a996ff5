"""Refuse what transformers would complete: parameters that a checkpoint lacks get random numbers there, and a warning at most."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from seedpack.converter.sources.base import SourceTensor
from seedpack.dtypes import TORCH_DTYPES
from seedpack.errors import FormatError, ModelError, first_line
from seedpack.formats import SafetensorsFile
from seedpack.hf.checkpoint_names import CheckpointNames
from seedpack.hf.internals import is_counter

_LAYERS = re.compile(r"(?:^|_)(?:layers?|blocks|depth)$")
SPARE_LAYERS = 100  # that a config may name beyond: defaults of settings that a small model does not use


def load_complete(cls: Any, path: Any, where: object, **options: Any) -> Any:
    """Load a model by transformers' `from_pretrained`, and refuse it unless every parameter came from the checkpoint.

    Args:
        cls: the class to load.
        path: as `from_pretrained` takes it.
        where: for the message.
        options: passed on.

    Raises:
        ModelError: naming parameters that are missing, or of another shape.
    """
    model, info = cls.from_pretrained(path, output_loading_info=True, **options)
    mismatched = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in info["mismatched_keys"]]
    if mismatched:
        raise _incomplete(where, "has another shape of", mismatched)
    if missing := [name for name in info["missing_keys"] if not is_counter(name)]:
        raise _incomplete(where, "lacks", missing)
    return model


def require_complete(names: CheckpointNames, tensors: Mapping[str, SourceTensor], where: str) -> None:
    """Refuse a checkpoint that does not fill a model; transformers tells, by loading tensors without data.

    Args:
        names: of the model's checkpoints.
        tensors: of this one, by its own names.
        where: for the message.

    Raises:
        ModelError: naming the model's parameters that are missing.
    """
    if missing := names.missing_experts(tensors):
        raise _incomplete(where, "lacks", missing)
    model = names.model
    forms = ((name, TORCH_DTYPES[tensor.dtype], tensor.shape) for name, tensor in tensors.items())
    state = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in forms}
    try:
        with _quiet():
            load_complete(type(model), None, where, config=model.config, state_dict=state, device_map={"": "meta"})
    except ModelError:
        raise
    except Exception as error:  # shapes that differ, experts that are missing: transformers' own
        raise ModelError(
            f"{where}: its tensors do not make up a {type(model).__name__} ({first_line(error)})"
        ) from None


def require_layers(path: Path, config: object) -> None:
    """Refuse a folder whose config names far more layers than its files have tensors, before transformers builds them one by one.

    Raises:
        ModelError: naming the setting.
    """
    tensors = 0
    for file in path.glob("*.safetensors"):
        with contextlib.suppress(FormatError), contextlib.closing(SafetensorsFile(file)) as opened:
            tensors += len(opened.header.tensors)
    for name, layers in _counts_of_layers(config) if tensors else ():
        if layers > tensors + SPARE_LAYERS:
            raise ModelError(
                f"{path / 'config.json'}: {name} is {layers}, but the weights are {tensors} tensors; get the config.json that "
                "belongs to them"
            )


def _counts_of_layers(config: object) -> Iterator[tuple[str, int]]:
    for key, value in config.items() if isinstance(config, dict) else ():
        if type(value) is int and _LAYERS.search(key):
            yield key, value
        yield from _counts_of_layers(value)


def _incomplete(where: object, problem: str, names: Iterable[str]) -> ModelError:
    """Return the error for parameters that a checkpoint cannot fill, some of which it names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    return ModelError(
        f"{where}: {problem} {', '.join(ordered[:4])}{more}; transformers would fill in random numbers: get the whole "
        "checkpoint, and the config.json that belongs to it, or if they may be random pack what from_pretrained and "
        "save_pretrained make of it"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the reports and progress bars of transformers for a while."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
