"""A module in memory: its own classes say what each weight is."""

from __future__ import annotations

from torch import nn

from seedpack.converter.sources.base import Kind, OpenModel
from seedpack.converter.sources.state_dict import StateDictSource
from seedpack.errors import ModelError
from seedpack.loader.layers import PackedModule, is_transposed, packed_class


def module_kind(module: nn.Module | None, leaf: str) -> Kind:
    """Return kind, transposed and group of the parameter `leaf` of a module."""
    if module is None or leaf != "weight" or packed_class(module) is None:
        return "", False, ""
    if isinstance(module, nn.Embedding):
        return "embedding", False, ""
    return (
        ("linear", is_transposed(module), "")
        if is_transposed(module) or isinstance(module, nn.Linear)
        else ("conv", False, "")
    )


class ModuleSource(StateDictSource):
    """A module in memory: its own classes say what each weight is."""

    def __init__(self, module: nn.Module):
        modules = dict(module.named_modules())
        if packed := [name for name, part in modules.items() if isinstance(part, PackedModule)]:
            raise ModelError(
                f"{type(module).__name__}: its layer {packed[0]!r} is packed already; seedpack.save saves it, and what is to be "
                "packed otherwise starts from the dense model"
            )

        def kind_of(name: str, shape: tuple[int, ...]) -> Kind:
            parent, _, leaf = name.rpartition(".")
            return module_kind(modules.get(parent), leaf)

        self._module = module
        super().__init__(type(module).__name__, module.state_dict(), kind_of)

    def parameters(self, name: str) -> list[str]:
        """Return the tensor's name and those that share its storage."""
        return [name, *(other for other, first in self.shared.items() if first == name)]

    def open_model(self) -> OpenModel:
        """Return the module itself."""
        return OpenModel(self._module)
