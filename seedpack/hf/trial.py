"""A trial before a model is packed: does it run with its parameters packed? On the meta device, so without data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.codecs.raw import RawCodec
from seedpack.loader.parameters import can_pack, pack_
from seedpack.loader.weight import PackedWeight, recording_writes

WRITTEN_TO = "the model writes to it"
FAILS = "the model does not run with it packed"


def refused_parameters(make: Callable[[], nn.Module]) -> dict[str, str]:
    """Return the parameters of a transformers model that have to stay dense, by name, with the reason.

    Those that its forward pass writes to; and if it runs dense but not packed, those that it fails with.

    Args:
        make: returns the model, on the meta device.
    """
    dense = make()
    tensors = chain(dense.named_parameters(), dense.named_buffers())
    names = [name for name, tensor in tensors if tensor.dim() > 1 and 0 not in tensor.shape]
    error = run_on_meta(dense)
    written, packed_error = _run_packed(make(), names)
    refused = dict.fromkeys(written, WRITTEN_TO)
    if packed_error is not None and error is None:
        left = [name for name in names if name not in written]
        refused |= dict.fromkeys(_culprits(make, left), FAILS)
    return refused


def _run_packed(model: nn.Module, names: Collection[str]) -> tuple[set[str], Exception | None]:
    """Run a model with some parameters packed; return those that it writes to, and the error that it ends in."""
    owners: dict[str, PackedWeight] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        if can_pack(module, leaf):
            pack_(module, leaf, RawCodec("F32"))
            owners[name] = getattr(module, leaf)
    with recording_writes() as layers:
        error = run_on_meta(model)
    return {name for name, weight in owners.items() if any(weight.is_of(layer) for layer in layers)}, error


def _culprits(make: Callable[[], nn.Module], names: Sequence[str]) -> Sequence[str]:
    """Return those of some parameters that a model does not run with, by halves; all of them if no half fails alone."""
    if len(names) < 2:
        return names
    middle = len(names) // 2
    failing = [half for half in (names[:middle], names[middle:]) if _run_packed(make(), half)[1] is not None]
    return [name for half in failing for name in _culprits(make, half)] or names


def run_on_meta(model: nn.Module) -> Exception | None:
    """Run the forward pass of a transformers model on the meta device, as far as it gets; return the error it ends in.

    It is foreign code in conditions that it was not made for: whatever it raises, what it reached so far stands.
    """
    training = model.training
    try:
        with torch.no_grad(), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.eval()(**_inputs(model))
    except Exception as error:
        return error
    finally:
        model.train(training)
    return None


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return four tokens, or for a model of images one image."""
    if getattr(model, "main_input_name", "") != "pixel_values":
        return {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    config: Any = model.config
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    dtype: torch.dtype = getattr(model, "dtype", torch.float32)
    return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width, dtype=dtype)}
