"""Put a checkpoint's tensors into a module, packed layers staying packed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from seedpack.errors import ModelError
from seedpack.formats import Checkpoint
from seedpack.model.layers import PackedLinear, PackedModule, is_transposed, pack_module_, packed_class
from seedpack.model.stored import stored_dense, stored_parts

WRAPPER_PREFIX = "module."  # what nn.DataParallel puts before every name


@dataclass
class Loaded:
    """What `fill_` did: names that stay packed in memory, and packed ones whose module keeps them dense."""

    packed: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)


def fill_(model: nn.Module, checkpoint: Checkpoint) -> Loaded:
    """Load every tensor of a checkpoint into a module of the same names and shapes, in place.

    Nothing is changed unless all names and shapes fit.

    Raises:
        ModelError: names are missing or too many, or shapes differ.
    """
    manifest = checkpoint.manifest
    state = model.state_dict(keep_vars=True)
    targets = {name: name for name in manifest.tensors} | manifest.shared
    if targets and all(name.startswith(WRAPPER_PREFIX) for name in targets) and not any(
        name.startswith(WRAPPER_PREFIX) for name in state
    ):  # fmt: skip
        targets = {name.removeprefix(WRAPPER_PREFIX): stored for name, stored in targets.items()}
    _require_same(state, targets, checkpoint)
    modules = dict(model.named_modules(remove_duplicate=False))
    loaded = Loaded()
    done: dict[str, PackedModule] = {}
    for target, stored in targets.items():
        parent, _, leaf = target.rpartition(".")
        module = modules[parent]
        if isinstance(module, PackedModule) and leaf == "weight":
            continue  # the same module under a further name
        same_way = manifest.tensors[stored].transposed == is_transposed(module)
        if manifest.is_packed(stored) and leaf == "weight" and packed_class(module) is not None and same_way:
            codec, parts = stored_parts(checkpoint, stored)
            packed = pack_module_(module, codec, parts)
            if stored in done:
                for name in parts:
                    packed.register_parameter(name, done[stored]._parameters[name])
            done[stored] = packed
            loaded.packed.append(target)
            continue
        if manifest.is_packed(stored):
            loaded.dense.append(target)
        destination = state[target]
        with torch.no_grad():
            destination.copy_(stored_dense(checkpoint, stored))
    return loaded


def use_int8_activations_(model: nn.Module) -> None:
    """Have packed linear layers round their input to 8 bits in groups of 256, where their codec can.

    Raises:
        ModelError: no layer can.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    able = [layer for layer in layers if layer.codec.int8_activations]
    if not able:
        found = ", ".join(sorted({layer.codec.id for layer in layers})) or "none"
        raise ModelError(f"activations of 8 bits: no packed linear layer's codec takes them (found: {found})")
    for layer in able:
        layer.int8_activations = True


def _require_same(state: dict[str, Tensor], targets: dict[str, str], checkpoint: Checkpoint) -> None:
    optional = {name for name in state if name.endswith(".num_batches_tracked")}  # files before torch 0.4.1 lack it
    missing, surplus = sorted(state.keys() - targets.keys() - optional), sorted(targets.keys() - state.keys())
    if missing or surplus:
        problem = []
        if missing:
            problem.append(f"the file lacks {len(missing)} of the model's tensors, as {missing[0]!r}")
        if surplus:
            problem.append(f"the model lacks {len(surplus)} of the file's tensors, as {surplus[0]!r}")
        raise ModelError(f"{checkpoint.path}: {'; '.join(problem)}; build the model that the file was made from")
    for target, stored in targets.items():
        found, expected = tuple(state[target].shape), checkpoint.manifest.tensors[stored].shape
        if found != expected:
            raise ModelError(
                f"{checkpoint.path}: tensor {target!r}: the file has shape {list(expected)}, the model {list(found)}"
            )
