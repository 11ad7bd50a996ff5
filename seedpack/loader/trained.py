"""What modules and parametrisations say of themselves that are pseudorandom from the start: how `seedpack.save` stores them.

`seedpack.nn` and `seedpack.reparam` implement these; saving and loading know no more of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seedpack.codecs.base import Codec, matrix_shape
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.coefficients import stored, values_of
from seedpack.errors import ModelError
from seedpack.formats import View
from seedpack.kernels.basis.weight import basis_weight


@dataclass(frozen=True)
class Born:
    """A tensor as it is stored: dense shape, codec, parts."""

    shape: tuple[int, ...]
    codec: Codec
    parts: dict[str, Tensor]


class Coefficients:
    """What is trained as coefficients of pseudorandom bases: a layer's weight, or a tensor that several weights are pieces of.

    Attributes:
        codec: how it is stored.
        stored_shape: of the dense tensor.
        coefs: float32 [blocks, count].
    """

    codec: BasisCodec
    stored_shape: tuple[int, ...]
    coefs: nn.Parameter
    remedy: ClassVar[str] = "build it with the same settings"

    def born(self) -> Born:
        """The tensor as it is stored."""
        return Born(self.stored_shape, self.codec, stored(self.coefs, self.codec.coef_bits, self.codec.levels))

    def take_(self, codec: Codec, parts: dict[str, Tensor]) -> None:
        """Take the coefficients of a file, to train on.

        Raises:
            ModelError: they were made with other settings.
        """
        if codec != self.codec:
            raise ModelError(f"the file has {codec}, the model {self.codec}; {self.remedy}")
        with torch.no_grad():
            self.coefs.copy_(values_of(parts, self.coefs.shape[1], self.codec.coef_bits, self.codec.levels))

    def made(self, coefs: Tensor, index: Tensor | None = None) -> Tensor:
        """The dense tensor, as its codec's matrix [rows, columns] or some rows of it, from coefficients of its own form."""
        rows, columns = matrix_shape(self.stored_shape)
        return basis_weight(coefs, self.codec.noise, rows=rows, columns=columns, index=index)


class SharedCoefficients(Coefficients):
    """Coefficients that are the parameter `leaf` of `holder`."""

    holder: nn.Module
    leaf: str


class Piece(nn.Module):
    """The parametrisation (torch.nn.utils.parametrize) of a tensor that is a piece of another one, `basis`.

    `piece` says which, its `tensor` left out; a loader sets it to what the file has.
    """

    basis: SharedCoefficients
    piece: View


class Stored(nn.Module, ABC):
    """The parametrisation of a tensor that is stored by a codec."""

    @abstractmethod
    def born(self, originals: Any) -> Born:
        """The tensor as it is stored, from the tensors that the optimiser sees."""


@dataclass
class Bases:
    """The bases that a model's parametrisations are pieces of.

    Attributes:
        stored: by the name that they are stored under, that of their coefficients.
        names: every name of their coefficients in the model's state: a shared module has several.
        pieces: by the name of their tensor, what is a piece of one.
        state: names in the model's state of what pieces keep beside.
    """

    stored: dict[str, SharedCoefficients]
    names: set[str]
    pieces: dict[str, Piece]
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
        if not isinstance(module, Piece):
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
