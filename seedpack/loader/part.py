"""Parts of packed parameters as parameters: integers whose methods write no arithmetic into them.

Averages of parameters (EMA, SWA, model soups) and initialisers go over everything that a model has, and torch turns floats
that are written into integers to integers without a word: other codes, and another weight. An average of equal parts is
these parts, but for the rounding of its dtype, so it changes nothing; all else is refused.

Methods of parts are guarded, of their `data`, and of what `detach` and a state dict give. Torch's functions, and views of parts,
are beyond it: a check of each call would cost more than the call.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from seedpack.errors import ModelError
from seedpack.loader.weight import IN_PLACE_OPERATORS

_HARMLESS = {"copy_", "detach_", "rename_", "requires_grad_", "resize_", "resize_as_", "set_", "share_memory_"}

_AT_ONCE = 1 << 24  # integers that are compared at once


class Part(nn.Parameter):
    """An integer part. What `detach`, `data` and a state dict give of it is one too, in the same memory.

    Compilers, which run in a mode of torch's dispatcher, get plain tensors of these: they know no others.
    """

    @staticmethod
    def guard(parameter: nn.Parameter | None) -> None:
        """Make a parameter of integers a part, in place; any other stays as it is."""
        if type(parameter) is nn.Parameter and not parameter.is_floating_point() and not parameter.is_complex():
            parameter.__class__ = Part

    def detach(self) -> Tensor:
        """Return the same values."""
        values = super().detach()
        if not is_in_torch_dispatch_mode():
            values.__class__ = Part
        return values

    @property
    def data(self) -> Tensor:
        """The same values."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not value.is_floating_point():
            Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        else:
            self._require_same(value)

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Part:
        """Take other integers; of floats, only those that are these integers but for rounding, and without effect."""
        if source.is_floating_point() and not self.is_meta and not source.is_meta:
            self._require_same(source)
        else:
            super().copy_(source, non_blocking)
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        self.data[index].as_subclass(Part).copy_(torch.as_tensor(value, device=self.device))

    def _require_same(self, floats: Tensor) -> None:
        for some, part in zip(
            floats.expand_as(self).flatten().split(_AT_ONCE), self.flatten().split(_AT_ONCE), strict=True
        ):
            rounding = 4 * torch.finfo(floats.dtype).eps
            if not torch.allclose(
                some.to(self.device, torch.float64), part.to(torch.float64), rtol=rounding, atol=1e-2
            ):
                raise no_arithmetic()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch._utils._rebuild_parameter, (self.as_subclass(Tensor), False, OrderedDict())


def no_arithmetic() -> ModelError:
    """Return the error for arithmetic in place on a part."""
    return ModelError(
        "a part of a packed weight is read-only: its integers are codes, and other integers are another weight; average, "
        "initialise or change only parameters that require a gradient, or make the model dense first (seedpack unpack, or "
        "model.dequantize() in transformers)"
    )


def _refuse(self: Part, *args: Any, **kwargs: Any) -> NoReturn:
    raise no_arithmetic()


_IN_PLACE = {name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_")}
for _name in (_IN_PLACE | IN_PLACE_OPERATORS) - _HARMLESS:
    setattr(Part, _name, _refuse)
