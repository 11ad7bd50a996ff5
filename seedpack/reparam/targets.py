"""The tensors of a model that are reparametrised."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn

from seedpack.errors import ModelError
from seedpack.loader.layers import PackedModule, is_transposed
from seedpack.loader.trained import Coefficients, joined

BASIS_LEAF = "seedpack_basis"  # name of the parameter that holds the coefficients of a basis

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


@dataclass(frozen=True)
class Target:
    """A parameter: its module, that module's name, and the parameter's name there."""

    module: nn.Module
    prefix: str
    leaf: str

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return joined(self.prefix, self.leaf)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter."""
        return self.module._parameters[self.leaf]  # type: ignore[return-value]


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm, of torch or by its name."""
    return isinstance(module, NORMS) or type(module).__name__.endswith("Norm")


def targets_of(model: nn.Module, include: Sequence[str], exclude: Sequence[str], *, matrices: bool) -> list[Target]:
    """Return the parameters that match, in the model's order.

    They are those that are trained (`requires_grad`), but not of norms and layers of `seedpack.nn`; with `include`, any.

    Args:
        model: dense.
        include: patterns (fnmatch) of parameter names; given, only these.
        exclude: patterns of parameter names to leave alone.
        matrices: only those with two axes or more.

    Raises:
        ModelError: a pattern matches nothing, nothing is left, or something cannot be reparametrised.
    """
    candidates = [
        Target(module, prefix, leaf)
        for prefix, module in model.named_modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and leaf != BASIS_LEAF
    ]
    names = [target.name for target in candidates]
    sharing: dict[int, list[str]] = {}
    for target in candidates:
        sharing.setdefault(id(target.parameter), []).append(target.name)
    for pattern in (*include, *exclude):
        if not any(fnmatch.fnmatch(name, pattern) for name in names):
            raise ModelError(f"pattern {pattern!r} matches no parameter; names look like {names[:1]}")
    targets = []
    for target in candidates:
        if include and not any(fnmatch.fnmatch(target.name, pattern) for pattern in include):
            continue
        if any(fnmatch.fnmatch(target.name, pattern) for pattern in exclude):
            continue
        apart = is_norm(target.module) or isinstance(target.module, Coefficients) or not target.parameter.requires_grad
        if (apart and not include) or (matrices and target.parameter.dim() < 2):
            continue
        _require_usable(target)
        if len(tied := sharing[id(target.parameter)]) > 1:
            raise ModelError(
                f"{tied[0]!r} and {tied[1]!r} are one parameter; tied weights cannot be reparametrised: untie them, or exclude "
                "both"
            )
        targets.append(target)
    if not targets:
        raise ModelError(f"no parameter to reparametrise; the model has {names[:4]}")
    return targets


def _require_usable(target: Target) -> None:
    parameter: Tensor = target.parameter
    if isinstance(target.module, PackedModule) or not parameter.is_floating_point():
        raise ModelError(f"{target.name!r} is packed or not a float tensor; reparametrise a dense model")
    if isinstance(target.module, Coefficients):
        raise ModelError(
            f"{target.name!r} belongs to a layer of seedpack.nn, which is trained as coefficients already; exclude it"
        )
    if parameter.numel() == 0:
        raise ModelError(f"{target.name!r} has no elements; exclude it")
    if isinstance(target.module, nn.Embedding) and target.module.sparse:
        raise ModelError(
            f"{target.name!r} belongs to an embedding with sparse gradients, which a reparametrisation cannot have; exclude it"
        )
    if isinstance(target.module, nn.ParameterList):
        raise ModelError(f"{target.name!r} is in a ParameterList, which torch cannot parametrise; exclude it")
    if isinstance(target.module, nn.utils.parametrize.ParametrizationList):
        raise ModelError(f"{target.name!r} is parametrised already; exclude it")
    if not bool(torch.isfinite(parameter).all()):
        raise ModelError(f"{target.name!r} holds NaN or Inf")


def fan_in(module: nn.Module, weight: Tensor) -> int:
    """Return the count of inputs of one output of a weight; 1 for one axis."""
    return len(weight) if is_transposed(module) else math.prod(weight.shape[1:])


def refresh_recurrent(module: nn.Module) -> None:
    """Have an LSTM, GRU or RNN list its weights anew for each pass: it would keep those of an earlier one."""
    if not isinstance(module, nn.RNNBase) or "_init_flat_weights" in vars(module):
        return

    def refresh(layer: nn.RNNBase, *_: object) -> None:
        layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]
        layer._init_flat_weights = MethodType(refresh, layer)  # type: ignore[method-assign]

    def forget(layer: nn.RNNBase, *_: object) -> None:
        layer._flat_weights = []
        layer._init_flat_weights = MethodType(forget, layer)  # type: ignore[method-assign]

    forget(module)
    module.register_forward_pre_hook(refresh)
    module.register_forward_hook(forget, always_call=True)
