"""Second moments E[x·xᵀ] of the inputs of layers (the Hessians of the layer-wise error), summed while a model runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.errors import ModelError, first_line
from seedpack.kernels.common.row_tiles import bfloat16_is_faster
from seedpack.loader.layers import packed_class

RECENT = 4  # inputs that a layer's input is compared with
LEAST_COLUMNS = 128  # of a sum of products that are added at once


class InputMoments:
    """A context that sums x·xᵀ over the inputs of some layers; layers that share an input share its sum.

    Args:
        layers: by any name; those that `layer_input` does not know are left out.
    """

    def __init__(self, layers: Mapping[str, nn.Module]):
        self._layers = {name: layer for name, layer in layers.items() if measurable(layer)}
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._shared: dict[str, str] = {}
        self._recent: deque[tuple[Tensor, str]] = deque(maxlen=RECENT)
        self._hooks: list[Any] = []

    def __enter__(self) -> InputMoments:
        for name, layer in self._layers.items():
            self._hooks.append(
                layer.register_forward_pre_hook(lambda layer, args, name=name: self._called(name, layer, args))
            )
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._recent.clear()

    def means(self) -> dict[str, Tensor]:
        """Return E[x·xᵀ], float32 [in, in] on the CPU, of every layer that was called; one tensor for those that share it."""
        means = {name: mirrored(total / max(1, count)).cpu() for name, (total, count) in self._sums.items()}
        return means | {name: means[first] for name, first in self._shared.items() if first in means}

    def _called(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        alike = (known for tensor, known in self._recent if tensor is args[0] and known != name)
        first = next((known for known in alike if _form(self._layers[known]) == _form(layer)), None)
        if first is not None and name not in self._sums and self._shared.setdefault(name, first) == first:
            return
        self._shared.pop(name, None)
        self._recent.append((args[0], name))
        self.add(name, layer, args[0])

    def add(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """Add an input that a layer is not called with."""
        x = layer_input(layer, x.detach())
        total, count = self._sums.get(name, (None, 0))
        self._sums[name] = add_products(total, x), count + len(x)


def add_products(total: Tensor | None, x: Tensor) -> Tensor:
    """Return a sum [in, in] and xᵀ·x of x [n, in], of which the lower triangle counts: so much of the work is left out."""
    columns = x.shape[1]
    total = x.new_zeros(columns, columns) if total is None else total
    step = max(LEAST_COLUMNS, -(-columns // 4))
    for first in range(0, columns, step):
        total[first:, first : first + step].addmm_(x[:, first:].mT, x[:, first : first + step])
    return total


def mirrored(lower: Tensor) -> Tensor:
    """Return the symmetric matrix of a lower triangle."""
    return lower.tril() + lower.tril(-1).mT


def _form(layer: nn.Module) -> object:
    """Return what layers of one input must have in common to see the same of it."""
    names = ("kernel_size", "stride", "padding", "dilation")
    return [getattr(layer, name) for name in names] if isinstance(layer, (nn.Conv1d, nn.Conv2d)) else None


def measurable(layer: nn.Module) -> bool:
    """Return whether `layer_input` knows a layer: linear ones, and convolutions of one group with zeros around them."""
    if packed_class(layer) is None or isinstance(layer, nn.Embedding):
        return False
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return True


def layer_input(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the vectors that the rows of a layer's matrix are multiplied by, float32 [n, in]; for a convolution, patches."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        flat = isinstance(layer, nn.Conv1d)
        sizes = [getattr(layer, name) for name in ("kernel_size", "dilation", "padding", "stride")]
        if flat:
            x, sizes = x[..., None, :], [(0 if i == 2 else 1, *size) for i, size in enumerate(sizes)]
        x = torch.nn.functional.unfold(x, *sizes)
        return x.mT.reshape(-1, x.shape[-2]).float()
    return x.reshape(-1, x.shape[-1]).float()


def run(model: nn.Module, batches: Any, device: torch.device) -> dict[str, Tensor]:
    """Return the moments of all layers of a module that is run on batches: tensors, tuples of arguments, or dicts of
    keywords."""
    with InputMoments(dict(model.named_modules())) as collected, torch.no_grad(), evaluated(model):
        for number, batch in enumerate(batches):
            args, keywords = _arguments(batch, device)
            try:
                model(*args, **keywords)
            except (RuntimeError, TypeError, ValueError, LookupError) as error:  # the module's own
                raise ModelError(
                    f"calibration: {type(model).__name__} cannot run on batch {number} ({first_line(error)}); pass what its "
                    "forward takes: a tensor, a tuple of arguments, or a dict of keywords"
                ) from error
    means = collected.means()
    if not means:
        raise ModelError("calibration: no layer that can be calibrated was called; were there batches?")
    return {f"{name}.weight" if name else "weight": value for name, value in means.items()}


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; afterwards each of its modules is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def faster_in_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies matrices faster in bfloat16 than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bfloat16_is_faster()


def _arguments(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return (), {key: moved(value) for key, value in batch.items()}
    return tuple(moved(value) for value in (batch if isinstance(batch, (tuple, list)) else (batch,))), {}
