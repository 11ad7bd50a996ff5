"""Put a checkpoint's tensors into a module, packed layers staying packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from seedpack.codecs.base import Codec, Parts
from seedpack.errors import ModelError
from seedpack.formats import Checkpoint, View
from seedpack.loader.dense import require_decodable, stored_dense, stored_names, stored_parts, viewed
from seedpack.loader.layers import PackedModule, is_transposed, packed_class
from seedpack.loader.parameters import PackedParameters, can_pack, is_packed, pack_, product_codecs
from seedpack.loader.trained import Bases, Coefficients, bases_of, joined
from seedpack.loader.wrapped import is_optional, names_in_module
from seedpack.units import count


def fill_(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Load every tensor of a checkpoint into a module of the same names and shapes, in place.

    Nothing is changed unless all names and shapes fit.

    Returns:
        {name in the module: name in the checkpoint}.

    Raises:
        ModelError: names are missing or too many, or shapes differ.
        LimitError: a tensor that cannot stay packed takes too much decoded.
    """
    if any(isinstance(module, (PackedModule, PackedParameters)) for module in model.modules()):
        raise ModelError(f"{type(model).__name__}: is packed already; make a new one to fill")
    bases = bases_of(model)
    state, trained = _tensors_of(model, bases)
    targets = _targets(checkpoint, state, trained)
    _require_same(state, targets, checkpoint)
    _require_same_pieces(bases, checkpoint)
    _require_memory(model, state, checkpoint)
    filler = _Filler(model, checkpoint, state, trained)
    require_decodable(
        checkpoint, {stored for name, (stored, view) in targets.items() if filler.decodes(name, stored, view)}
    )
    for name, (stored, view) in targets.items():
        filler.fill(name, stored, view)
    for name in checkpoint.manifest.views.keys() & bases.pieces.keys():
        bases.pieces[name].piece = replace(checkpoint.manifest.views[name], tensor="")
    _leave_fast_paths(model)
    return {name: stored for name, (stored, _) in targets.items()}


def copy_(model: nn.Module) -> None:
    """Give every tensor of a module that is on the CPU memory of its own, apart from the file that it is a view of."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def use_int8_activations_(model: nn.Module, use: bool = True) -> None:
    """Have products with packed weights round their input to 8 bits in groups of 256 where their codec can, for any count of
    tokens; or have none round it at all.

    Raises:
        ModelError: they shall, and no weight's codec can.
    """
    codecs = {module: found for module in model.modules() if (found := product_codecs(module))}
    able = [module for module, found in codecs.items() if any(codec.int8_activations for codec in found)]
    if use and not able:
        names = ", ".join(sorted({codec.id for found in codecs.values() for codec in found})) or "none"
        raise ModelError(f"activations of 8 bits: no packed weight's codec takes them (found: {names})")
    for module in able if use else codecs:
        cast(Any, module).int8_activations = use


class _Filler:
    """Fills the tensors of a module one at a time.

    Args:
        model: the module.
        checkpoint: where its tensors come from.
        state: its tensors by name.
        trained: those of them that are trained as coefficients.
    """

    def __init__(
        self, model: nn.Module, checkpoint: Checkpoint, state: dict[str, Tensor], trained: dict[str, Coefficients]
    ):
        self._checkpoint, self._state, self._trained = checkpoint, state, trained
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._packed: dict[str, tuple[Codec, Parts]] = {}  # by the stored tensor
        self._real: dict[
            int, Tensor
        ] = {}  # tensors that have taken the place of those on the meta device, by their ids
        self._rebuilt: dict[str, Tensor] = {}  # the stored tensor that views are being cut from

    def decodes(self, name: str, stored: str, view: View | None) -> bool:
        """Return whether a tensor of the module is filled from the dense form of a stored one."""
        return name not in self._trained and not self._can_stay_packed(name, stored, view)

    def fill(self, name: str, stored: str, view: View | None) -> None:
        """Fill one tensor of the module from a stored one, or from a piece of it."""
        path, _, leaf = name.rpartition(".")
        module = self._modules[path]
        if is_packed(module, leaf):
            return  # already: the same module under another name
        if name in self._trained:
            self._trained[name].take_(*stored_parts(self._checkpoint, stored))
        elif self._can_stay_packed(name, stored, view):
            self._pack(module, leaf, stored)
        else:
            self._copy(self._on_a_device(name), stored, view)

    def _on_a_device(self, name: str) -> Tensor:
        """Return a tensor of the module, which takes a place in memory if it was on the meta device."""
        tensor = self._state[name]
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in self._real:
            value: Tensor = torch.empty_like(tensor, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            self._real[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
        path, _, leaf = name.rpartition(".")
        held = (
            self._modules[path]._parameters if leaf in self._modules[path]._parameters else self._modules[path]._buffers
        )
        held[leaf] = self._real[id(tensor)]
        return self._real[id(tensor)]

    def _can_stay_packed(self, name: str, stored: str, view: View | None) -> bool:
        path, _, leaf = name.rpartition(".")
        manifest, module = self._checkpoint.manifest, self._modules[path]
        same_way = packed_class(module) is None or manifest.tensors[stored].transposed == is_transposed(module)
        return manifest.is_packed(stored) and view is None and same_way and can_pack(module, leaf)

    def _pack(self, module: nn.Module, leaf: str, stored: str) -> None:
        if stored not in self._packed:  # tied: one copy of the parts
            codec, parts = stored_parts(self._checkpoint, stored)
            device = None if (tensor := getattr(module, leaf)).is_meta else tensor.device
            held: Parts = {part: nn.Parameter(value.to(device), requires_grad=False) for part, value in parts.items()}
            self._packed[stored] = codec, held
        entry = self._checkpoint.manifest.tensors[stored]
        pack_(module, leaf, *self._packed[stored], transposed=entry.transposed)

    def _copy(self, tensor: Tensor, stored: str, view: View | None) -> None:
        with torch.no_grad():
            if view is None:
                tensor.copy_(stored_dense(self._checkpoint, stored))
                return
            if stored not in self._rebuilt:
                self._rebuilt = {stored: stored_dense(self._checkpoint, stored, device=tensor.device)}
            tensor.copy_(viewed(self._rebuilt[stored], view))


def _tensors_of(model: nn.Module, bases: Bases) -> tuple[dict[str, Tensor], dict[str, Coefficients]]:
    """Return a module's tensors by the names that a file has, and those of them that are trained as coefficients.

    The dense tensor that coefficients stand for is on the meta device.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    trained: dict[str, Coefficients] = {**bases.stored}
    for name in bases.names | bases.state:
        state.pop(name, None)
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Coefficients):
            del state[joined(prefix, "coefs")]
            trained[joined(prefix, "weight")] = module
    dense = {
        name: torch.empty(coefs.stored_shape, dtype=torch.float32, device="meta") for name, coefs in trained.items()
    }
    return state | dense, trained


def _targets(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], trained: Mapping[str, Coefficients]
) -> dict[str, tuple[str, View | None]]:
    """Return {name in the module: (stored tensor, view of it or None for all)}.

    Where the module trains the coefficients of a stored tensor, that tensor is filled instead of its pieces.
    """
    views = {name: view for name, view in checkpoint.manifest.views.items() if view.tensor not in trained}
    targets = {name: (stored, view) for name, stored, view in stored_names(replace(checkpoint.manifest, views=views))}
    names = names_in_module(targets.keys(), state.keys())
    return {names[name]: target for name, target in targets.items()}


def _require_same(
    state: Mapping[str, Tensor], targets: Mapping[str, tuple[str, View | None]], checkpoint: Checkpoint
) -> None:
    """Require the module and the file to have the same names and shapes."""
    optional = set(filter(is_optional, state))
    missing, surplus = sorted(state.keys() - targets.keys() - optional), sorted(targets.keys() - state.keys())
    if missing or surplus:
        problems = []
        if missing:
            problems.append(f"the file lacks {count(len(missing), 'tensor')} of the model, such as {missing[0]!r}")
        if surplus:
            problems.append(f"the model lacks {count(len(surplus), 'tensor')} of the file, such as {surplus[0]!r}")
        remedy = "build the model that the file was made from"
        if (checkpoint.path / "config.json").is_file():
            remedy = f"load the folder by its own architecture, seedpack.load({str(checkpoint.path)!r}), or {remedy}"
        raise ModelError(f"{checkpoint.path}: {'; '.join(problems)}; {remedy}")
    for name, (stored, view) in targets.items():
        expected, found = (view or checkpoint.manifest.tensors[stored]).shape, tuple(state[name].shape)
        if found != expected:
            raise ModelError(
                f"{checkpoint.path}: tensor {name!r}: the file has shape {list(expected)}, the model {list(found)}"
            )


def _require_memory(model: nn.Module, state: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Refuse a module on the meta device with buffers that no file has: they would be left without values."""
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in state]
    if lost:
        raise ModelError(
            f"{checkpoint.path}: the model's buffer {lost[0]!r} is on the meta device, and no file holds it; build the model on a "
            "device that has memory"
        )


def _require_same_pieces(bases: Bases, checkpoint: Checkpoint) -> None:
    """Require a basis that the file has to have the same pieces in the module and in the file."""
    manifest = checkpoint.manifest
    if not bases.stored.keys() & manifest.tensors.keys():
        return
    of_file = {name: view.shape for name, view in manifest.views.items() if view.tensor in bases.stored}
    of_model = {name: piece.piece.shape for name, piece in bases.pieces.items()}
    different = {name for name in of_file.keys() | of_model.keys() if of_file.get(name) != of_model.get(name)}
    if different:
        raise ModelError(
            f"{checkpoint.path}: tensor {min(different)!r} is not the same piece of a basis in the file and in the model; "
            "reparametrise it with the same settings"
        )


def _leave_fast_paths(model: nn.Module) -> None:
    """Switch off the fast paths of torch's Transformer encoder, which read weights without calling their packed layers."""
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) and any(
            isinstance(part, (PackedModule, PackedParameters)) for part in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0
