"""The base of modules that hold the parts of packed parameters: what other code finds among their parameters.

Much code asks the first of a module's parameters for the dtype to compute in. Where that would be a part, the module has a
parameter without elements before it, `no_values`, which is in no state dict.

DistributedDataParallel is kept from sending parts: every process has loaded them from the same file, most process groups
cannot send 16-bit integers, and on the CPU they are views of the file. The module that is wrapped may lie anywhere above,
and it is known only when it is wrapped: it then becomes a child of DistributedDataParallel, which torch reports to a hook.
So does what peft is to train itself (`modules_to_save`), which no packed module can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from seedpack.errors import ModelError
from seedpack.loader.part import Part, no_arithmetic

NO_VALUES = "no_values"


class PartHolder(nn.Module):
    """A module whose packed parameters are held as parts: integer parameters without gradient.

    Attributes:
        compute_dtype: of decoded values.
    """

    compute_dtype: torch.dtype

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as `nn.Module` does when one is assigned; parts are guarded, and no floats take their place."""
        if param is not None and param.is_floating_point() and isinstance(self._parameters.get(name), Part):
            raise no_arithmetic()
        super().register_parameter(name, param)
        Part.guard(param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._guard_parts()

    def _guard_parts(self) -> None:
        for parameter in self._parameters.values():
            Part.guard(parameter)

    def put_float_first(self) -> None:
        """See to it that the first parameter is a float; once the parts are loaded, that it is where they are."""
        parts = {name: value for name, value in self._parameters.items() if value is not None and name != NO_VALUES}
        first = next(iter(parts.values()), None)
        known = self._parameters.pop(NO_VALUES, None)
        if first is None or first.is_floating_point():
            return
        device = torch.device("cpu") if first.is_meta else first.device
        empty = torch.empty(0, dtype=self.compute_dtype, device=device)
        parameters = dict(self._parameters)
        self._parameters.clear()
        self._parameters[NO_VALUES] = nn.Parameter(empty, requires_grad=False)
        if known is not None:
            vars(self._parameters[NO_VALUES]).update(vars(known))
        self._parameters.update(parameters)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that have values: who asks a single module looks each up in a file (as accelerate does)."""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if name.rpartition(".")[2] != NO_VALUES:
                yield name, parameter

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the parameters, the first of the module's dtype."""
        for _, parameter in super().named_parameters(recurse=recurse):
            yield parameter

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + NO_VALUES, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *args)
        missing_keys[:] = [name for name in missing_keys if name != prefix + NO_VALUES]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype  # .to(dtype), .half() and the like
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._guard_parts()
        return self


def _watch_wrappers(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Tell wrappers what they have to know of the module that they get."""
    if module is None:
        return
    if isinstance(parent, DistributedDataParallel):
        _ignore_parts(parent, module)
    elif name == "base_model" and hasattr(module, "peft_config"):
        _require_other_targets(module)
    elif type(parent).__name__ == "ModulesToSaveWrapper" and any(isinstance(m, PartHolder) for m in module.modules()):
        raise ModelError(
            f"modules_to_save: a packed {type(module).__name__.removeprefix('Packed')} cannot be trained itself; leave it raw when "
            "the model is packed (exclude, --exclude), or make the model dense first (model.dequantize() in transformers)"
        )


def _require_other_targets(adapted: nn.Module) -> None:
    """Refuse adapters of peft on packed parameters themselves, which it would pass over with a warning at most."""
    packed = [
        f"{name}.{leaf}"
        for name, module in adapted.named_modules()
        if isinstance(module, PartHolder)
        for leaf in getattr(module, "pieces", ())
    ]
    for config in adapted.peft_config.values():  # type: ignore[operator]
        for target in getattr(config, "target_parameters", None) or ():
            if any(f".{name}".endswith(f".{target}") for name in packed):
                raise ModelError(
                    f"target_parameters: {target!r} is packed, and peft cannot add to it; target layers (target_modules), or make "
                    "the model dense first (model.dequantize() in transformers)"
                )


def _ignore_parts(parent: DistributedDataParallel, module: nn.Module) -> None:
    """Add the names of parts, as a module has them, to those that DistributedDataParallel ignores."""
    for prefix, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, PartHolder):
            names = [leaf for leaf, value in child._parameters.items() if value is not None and _is_part(value)]
            parent.parameters_to_ignore.update(f"{prefix}.{leaf}".removeprefix(".") for leaf in names)


def _is_part(value: Tensor) -> bool:
    return not value.is_floating_point() or not value.numel()


register_module_module_registration_hook(_watch_wrappers)
