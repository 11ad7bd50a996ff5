"""A module in memory: its own classes say what each weight is."""

from __future__ import annotations

from torch import nn

from seedpack.converter.sources.base import Kind, Source, StateDictSource
from seedpack.loader.layers import is_transposed, packed_class


def module_kind(module: nn.Module | None, leaf: str) -> Kind:
    """(kind, transposed, group) of the parameter `leaf` of a module."""
    if module is None or leaf != "weight" or packed_class(module) is None:
        return "", False, ""
    if isinstance(module, nn.Embedding):
        return "embedding", False, ""
    return ("conv", False, "") if isinstance(module, (nn.Conv1d, nn.Conv2d)) else ("linear", is_transposed(module), "")


def from_module(model: nn.Module) -> Source:
    """The source of a live module's state dict."""
    modules = dict(model.named_modules())

    def kinds(name: str, shape: tuple[int, ...]) -> Kind:
        parent, _, leaf = name.rpartition(".")
        return module_kind(modules.get(parent), leaf)

    source = StateDictSource.from_tensors(type(model).__name__, model.state_dict(), kinds, opened=lambda: (model, None))
    source.parameters = lambda name: [name, *(other for other, first in source.shared.items() if first == name)]
    return source
