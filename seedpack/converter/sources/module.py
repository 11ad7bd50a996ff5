"""A module in memory: its own classes say what each weight is."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from seedpack.converter.sources.base import Kind, OpenModel
from seedpack.converter.sources.kinds import matrix_kind
from seedpack.converter.sources.state_dict import StateDictSource
from seedpack.errors import ModelError
from seedpack.loader.layers import PackedModule, is_transposed, packed_class
from seedpack.loader.parameters import PackedParameters, can_pack

_NORM = re.compile("norm", re.IGNORECASE)
_ROUTER_CLASS = re.compile("router|gate", re.IGNORECASE)
_ROUTER_NAME = re.compile(r"(.*_)?router(_.*)?")


def module_kind(modules: Mapping[str, nn.Module], name: str) -> Kind:
    """Tell how a parameter of a model is packed.

    Args:
        modules: of the model, by name.
        name: of the parameter.
    """
    path, _, leaf = name.rpartition(".")
    module = modules.get(path)
    if module is None or not can_pack(module, leaf):
        return Kind()
    is_layer = packed_class(module) is not None
    if _is_router(modules, path) or (not is_layer and _ROUTER_CLASS.search(type(module).__name__)):
        return Kind(note="of a router, which few bits would change the choices of")
    if not is_layer:
        return _parameter_kind(module, leaf)
    if isinstance(module, nn.Embedding):
        return Kind("embedding")
    if is_transposed(module) or isinstance(module, nn.Linear):
        return Kind("linear", is_transposed(module))
    return Kind("conv")


def _is_router(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Return whether a module chooses experts: by a name on its path, or as the gate beside the experts."""
    parent, _, own = path.rpartition(".")
    beside = f"{parent}.experts".lstrip(".")
    return any(map(_ROUTER_NAME.fullmatch, path.split("."))) or (own == "gate" and beside in modules)


def _parameter_kind(module: nn.Module, leaf: str) -> Kind:
    """Tell how a parameter of a module that is no known layer is packed; transformers' experts say that theirs are [in, out]."""
    if _NORM.search(type(module).__name__):
        return Kind(note="of a norm")
    kind = matrix_kind(leaf, tuple(getattr(module, leaf).shape))
    return kind._replace(transposed=kind.stacked and bool(getattr(module, "is_transposed", False)))


def require_dense(module: nn.Module) -> None:
    """Refuse a module that is packed already.

    Raises:
        ModelError: naming a packed layer.
    """
    for name, part in module.named_modules():
        if isinstance(part, (PackedModule, PackedParameters)):
            raise ModelError(
                f"{type(module).__name__}: its layer {name!r} is packed already; seedpack.save saves it, and what is to be "
                "packed otherwise starts from the dense model"
            )


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device that a module is on, or None if there are several, or none."""
    devices = {parameter.device for parameter in module.parameters()}
    return devices.pop() if len(devices) == 1 else None


def put_back(module: nn.Module, device: torch.device | None) -> None:
    """Put a module back on the device that it was on, if it is on another."""
    if device is not None and device_of(module) != device:
        module.to(device)


class ModuleSource(StateDictSource):
    """A module in memory: its own classes say what each weight is."""

    def __init__(self, module: nn.Module):
        require_dense(module)
        modules = dict(module.named_modules())

        def kind_of(name: str, shape: tuple[int, ...]) -> Kind:
            return module_kind(modules, name)

        self._module, self._device = module, device_of(module)
        super().__init__(type(module).__name__, module.state_dict(), kind_of)

    def parameters(self, name: str) -> list[str]:
        """Return the tensor's name and those that share its storage."""
        return [name, *(other for other, first in self.shared.items() if first == name)]

    def open_model(self) -> OpenModel:
        """Return the module itself."""
        return OpenModel(self._module)

    def give_back(self) -> None:
        """Put the module back on its device."""
        put_back(self._module, self._device)
