"""What modules and parametrisations say of themselves that are pseudorandom from the start: how `seedpack.save` stores them.

`seedpack.nn` and `seedpack.reparam` implement these; saving and loading know no more of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from seedpack.codecs.base import Codec
from seedpack.errors import ModelError
from seedpack.formats import View


@dataclass(frozen=True)
class Born:
    """A tensor as it is stored: dense shape, codec, parts."""

    shape: tuple[int, ...]
    codec: Codec
    parts: dict[str, Tensor]


class BornModule(nn.Module):
    """A module whose weight is stored by a codec. `own` are the names in its state that stand for the weight."""

    own: tuple[str, ...]
    stored_shape: tuple[int, ...]  # of the dense weight

    def born(self) -> Born:
        """The weight as it is stored."""
        raise NotImplementedError

    def take_(self, codec: Codec, parts: dict[str, Tensor]) -> None:
        """Take a stored weight's coefficients.

        Raises:
            ModelError: it was made with other settings.
        """
        raise NotImplementedError


class BornBasis:
    """A stored tensor of which several of a model's are pieces. Its coefficients are the parameter `leaf` of `holder`."""

    holder: nn.Module
    leaf: str
    stored_shape: tuple[int, ...]

    def born(self) -> Born:
        """As it is stored."""
        raise NotImplementedError

    def take_(self, codec: Codec, parts: dict[str, Tensor]) -> None:
        """As `BornModule.take_`."""
        raise NotImplementedError


class BornParametrization(nn.Module):
    """A parametrisation (torch.nn.utils.parametrize) of a tensor that is stored by a codec, or is a piece of a basis."""

    basis: BornBasis | None = None
    piece: View | None = None  # of the basis; its `tensor` is left out. Set by a loader to what the file has

    def born(self, originals: Any) -> Born:
        """The tensor as it is stored, from the tensors that the optimiser sees; for what is no piece."""
        raise NotImplementedError


@dataclass
class Bases:
    """The bases that a model's parametrisations are pieces of.

    Attributes:
        stored: by the name that they are stored under, that of their coefficients.
        names: every name of their coefficients in the model's state: a shared module has several.
        pieces: by the name of their tensor, what is a piece of one.
        state: names in the model's state of what pieces keep beside.
    """

    stored: dict[str, BornBasis]
    names: set[str]
    pieces: dict[str, BornParametrization]
    state: set[str]


def bases_of(model: nn.Module) -> Bases:
    """The bases of a module's weights, where they lie inside it.

    Raises:
        ModelError: they lie outside.
    """
    prefixes: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        prefixes.setdefault(id(module), []).append(prefix)
    found = Bases({}, set(), {}, set())
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, BornParametrization) or module.basis is None:
            continue
        holders = prefixes.get(id(module.basis.holder))
        if holders is None:
            raise ModelError(
                "the coefficients of its weights lie outside this module; take the one that basis_ was given"
            )
        found.stored[joined(holders[0], module.basis.leaf)] = module.basis
        found.names |= {joined(holder, module.basis.leaf) for holder in holders}
        found.pieces[tensor_name(prefix.rpartition(".")[0])] = module
        found.state |= {joined(prefix, name) for name in module.state_dict()}
    return found


def tensor_name(prefix: str) -> str:
    """The parametrised tensor's name, from that of its list of parametrisations.

    >>> tensor_name("a.b.parametrizations.weight"), tensor_name("parametrizations.bias")
    ('a.b.weight', 'bias')
    """
    holder, _, leaf = prefix.rpartition(".")
    return joined(holder.rpartition("parametrizations")[0].rstrip("."), leaf)


def joined(prefix: str, name: str) -> str:
    """A name behind a module's."""
    return f"{prefix}.{name}" if prefix else name
