"""The power of each input channel of a layer, without data: from the norm whose output the layer takes.

A norm's output has the power gain² + bias² in each channel, if its normalised input is even. Which layer takes which
norm's output is found by running the model without weights or data, on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.hf.trial import run_on_meta
from seedpack.loader.layers import packed_class


def norm_before_layer(model: nn.Module) -> dict[str, str]:
    """Return {name of a layer: name of the norm whose output is its input} of a transformers model on the meta device.

    A model whose forward pass cannot run there (it needs other inputs than token ids, or values) gives what it reached.
    """
    outputs: list[tuple[Tensor, str]] = []  # kept, so that no other tensor gets the identity of one
    norms: dict[str, str] = {}
    hooks = []

    def norm_done(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append((output, name))

        return hook

    def layer_called(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                taken = (args[0], args[0]._base)
                for output, norm in outputs:
                    if output is taken[0] or output is taken[1]:
                        norms[name] = norm

        return hook

    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1 and "norm" in type(module).__name__.lower():
            hooks.append(module.register_forward_hook(norm_done(name)))
        elif packed_class(module) is not None and not isinstance(module, nn.Embedding):
            hooks.append(module.register_forward_pre_hook(layer_called(name)))
    try:
        run_on_meta(model)
    finally:
        for hook in hooks:
            hook.remove()
    return norms


def output_power(norm: nn.Module, values: Mapping[str, Tensor]) -> Tensor:
    """Return gain² + bias² of each channel of a norm [width], float64; `values` are its parameters.

    The gain is how far the output goes for ±1 from where it is for 0: so it is right for norms that add 1 to it.
    """
    norm = copy.deepcopy(norm).to_empty(device="cpu").double()
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.copy_(values[name])
        width = norm.get_parameter("weight").shape[0]
        ones = 1.0 - 2.0 * (torch.arange(width, dtype=torch.float64) % 2)
        at_zero = norm(torch.zeros(1, width, dtype=torch.float64))[0]
        power: Tensor = (norm(ones[None])[0] - at_zero).square() + at_zero.square()
    return power.double()
