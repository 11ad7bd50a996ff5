"""Put a checkpoint's tensors into a module, packed layers staying packed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from seedpack.errors import ModelError
from seedpack.formats import Checkpoint, Manifest
from seedpack.loader.dense import stored_dense, stored_names, stored_parts, viewed
from seedpack.loader.layers import PackedLinear, PackedModule, is_transposed, pack_module_, packed_class
from seedpack.loader.trained import Bases, Coefficients, bases_of, joined

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
    state, born, bases = _targets_in(model)
    views = {name: view for name, view in manifest.views.items() if view.tensor not in born}
    targets = {name: stored for name, stored, _ in stored_names(replace(manifest, views=views))}
    if targets and all(name.startswith(WRAPPER_PREFIX) for name in targets) and not any(
        name.startswith(WRAPPER_PREFIX) for name in state
    ):  # fmt: skip
        targets = {name.removeprefix(WRAPPER_PREFIX): stored for name, stored in targets.items()}
        views = {name.removeprefix(WRAPPER_PREFIX): view for name, view in views.items()}
    shapes = {
        target: views[target].shape if target in views else manifest.tensors[stored].shape
        for target, stored in targets.items()
    }
    _require_same(state, shapes, checkpoint)
    if any(name in manifest.tensors for name in bases.stored):
        _require_pieces(bases, manifest, checkpoint.path)
    modules = dict(model.named_modules(remove_duplicate=False))
    loaded = Loaded()
    done: dict[str, PackedModule] = {}
    dense: dict[str, Tensor] = {}  # the stored tensor that views are being made of
    for target, stored in targets.items():
        parent, _, leaf = target.rpartition(".")
        module = modules[parent]
        if isinstance(module, PackedModule) and leaf == "weight":
            continue  # the same module under a further name
        same_way = manifest.tensors[stored].transposed == is_transposed(module)
        view = views.get(target)
        if target in born:
            born[target].take_(*stored_parts(checkpoint, stored))
            continue
        packable = manifest.is_packed(stored) and view is None and same_way
        if packable and leaf == "weight" and packed_class(module) is not None:
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
        if view is not None and stored not in dense:
            dense = {stored: stored_dense(checkpoint, stored, device=state[target].device)}
        with torch.no_grad():
            state[target].copy_(stored_dense(checkpoint, stored) if view is None else viewed(dense[stored], view))
    for name in manifest.views.keys() & bases.pieces.keys():
        bases.pieces[name].piece = replace(manifest.views[name], tensor="")
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(m, PackedModule) for m in module.modules()
        ):
            module.activation_relu_or_gelu = 0  # its fast path reads the weights of its layers without calling them
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


def _targets_in(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Coefficients], Bases]:
    """A model's tensors by the names that a file has, those that are stored as coefficients, to train on, and bases."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    bases = bases_of(model)
    born: dict[str, Coefficients] = {**bases.stored}
    for name in bases.names | bases.state:
        state.pop(name, None)
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Coefficients):
            del state[joined(prefix, "coefs")]
            born[joined(prefix, "weight")] = module
    state |= {name: torch.empty(each.stored_shape, device="meta") for name, each in born.items()}
    return state, born, bases


def _require_pieces(bases: Bases, manifest: Manifest, where: object) -> None:
    """The model's tensors that are pieces of a basis are those of the file, and of its shapes."""
    of_file = {name: view.shape for name, view in manifest.views.items() if view.tensor in bases.stored}
    of_model = {name: piece.piece.shape for name, piece in bases.pieces.items()}
    if of_file != of_model:
        odd = sorted(name for name in of_file.keys() | of_model.keys() if of_file.get(name) != of_model.get(name))
        raise ModelError(f"{where}: tensor {odd[0]!r} is not the same piece of a basis in the file and in the model; "
                         "reparametrise it with the same settings")  # fmt: skip


def _require_same(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], checkpoint: Checkpoint) -> None:
    optional = {name for name in state if name.endswith(".num_batches_tracked")}  # files before torch 0.4.1 lack it
    missing, surplus = sorted(state.keys() - shapes.keys() - optional), sorted(shapes.keys() - state.keys())
    if missing or surplus:
        problem = []
        if missing:
            problem.append(f"the file lacks {len(missing)} of the model's tensors, as {missing[0]!r}")
        if surplus:
            problem.append(f"the model lacks {len(surplus)} of the file's tensors, as {surplus[0]!r}")
        raise ModelError(f"{checkpoint.path}: {'; '.join(problem)}; build the model that the file was made from")
    for target, expected in shapes.items():
        found = tuple(state[target].shape)
        if found != expected:
            raise ModelError(
                f"{checkpoint.path}: tensor {target!r}: the file has shape {list(expected)}, the model {list(found)}"
            )
