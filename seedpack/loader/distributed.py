"""Keep DistributedDataParallel from sending the parts of packed layers.

Every process has loaded them from the same file, most process groups cannot send 16-bit integers, and on the CPU they are
views of the file. The module that is wrapped may lie anywhere above the packed layers, and it is known only when it is
wrapped: DistributedDataParallel then registers it as its child, which torch reports to a hook.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

Holder = TypeVar("Holder", bound=type[nn.Module])

_holders: list[type[nn.Module]] = []


def keeps_parts(cls: Holder) -> Holder:
    """Have the integer parameters of a class of packed modules left out of what is sent."""
    _holders.append(cls)
    _watch()
    return cls


@cache
def _watch() -> None:
    register_module_module_registration_hook(_ignore_parts)


def _ignore_parts(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Add the names of parts, as the module has them, to those that DistributedDataParallel ignores."""
    if not isinstance(parent, DistributedDataParallel) or module is None:
        return
    packed = ((prefix, child) for prefix, child in module.named_modules(remove_duplicate=False) if _is_packed(child))
    for prefix, child in packed:
        for name, part in child._parameters.items():
            if part is not None and not (part.is_floating_point() and part.numel()):
                parent.parameters_to_ignore.add(f"{prefix}.{name}".removeprefix("."))


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, tuple(_holders))
