"""Interfaces of modules and parametrisations that are trained in a random subspace: how `seedpack.save` stores them.

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
class StoredTensor:
    """A tensor as it is stored: dense shape, codec, parts."""

    shape: tuple[int, ...]
    codec: Codec
    parts: dict[str, Tensor]


class Coefficients:
    """The coefficients of a pseudorandom basis, which are trained in place of a tensor.

    The tensor is a layer's weight, or one that several weights are pieces of.

    Attributes:
        codec: of the tensor.
        stored_shape: of the dense tensor.
        coefs: float32 [blocks, count].
    """

    codec: BasisCodec
    stored_shape: tuple[int, ...]
    coefs: nn.Parameter
    remedy: ClassVar[str] = "build it with the same settings"

    def to_parts(self) -> StoredTensor:
        """Return the tensor as it is stored."""
        return StoredTensor(self.stored_shape, self.codec, stored(self.coefs, self.codec.coef_bits, self.codec.levels))

    def take_(self, codec: Codec, parts: dict[str, Tensor]) -> None:
        """Take the coefficients of a file, to train on.

        Raises:
            ModelError: the file's codec has other settings.
        """
        if codec != self.codec:
            raise ModelError(f"the file has {codec}, the model {self.codec}; {self.remedy}")
        with torch.no_grad():
            self.coefs.copy_(values_of(parts, self.coefs.shape[1], self.codec.coef_bits, self.codec.levels))

    def materialise(self, coefs: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the dense tensor of some coefficients, as its codec's matrix [rows, columns] or the rows `index` of it."""
        rows, columns = matrix_shape(self.stored_shape)
        return basis_weight(coefs, self.codec.noise, rows=rows, columns=columns, index=index)


class SharedCoefficients(Coefficients):
    """Coefficients that are the parameter `leaf` of `holder`."""

    holder: nn.Module
    leaf: str


class Piece(nn.Module):
    """The parametrisation (torch.nn.utils.parametrize) of a tensor that is a piece of another one, that of `basis`.

    `piece` says which, its `tensor` left out; a loader sets it to that of the file.
    """

    basis: SharedCoefficients
    piece: View


class SeededModule(nn.Module, ABC):
    """The parametrisation of a tensor that a codec stores as a seed and what was trained."""

    @abstractmethod
    def to_parts(self, originals: Any) -> StoredTensor:
        """Return the tensor as it is stored, from the tensors that the optimiser sees."""


@dataclass
class Bases:
    """The coefficients of tensors that a model's parametrisations are pieces of.

    Attributes:
        stored: by the name that they are stored under, their own.
        names: every name of theirs in the model's state: a shared module has several.
        pieces: the parametrisations, by the name of their tensor.
        state: names in the model's state of what pieces keep beside.
    """

    stored: dict[str, SharedCoefficients]
    names: set[str]
    pieces: dict[str, Piece]
    state: set[str]


def bases_of(model: nn.Module) -> Bases:
    """Find the bases of a module's weights.

    Raises:
        ModelError: they lie outside of the module.
    """
    prefixes: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        prefixes.setdefault(id(module), []).append(prefix)
    bases = Bases({}, set(), {}, set())
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Piece):
            continue
        holders = prefixes.get(id(module.basis.holder))
        if holders is None:
            raise ModelError(
                "the coefficients of its weights lie outside this module; pass the module that basis_ was called with"
            )
        bases.stored[joined(holders[0], module.basis.leaf)] = module.basis
        bases.names |= {joined(holder, module.basis.leaf) for holder in holders}
        bases.pieces[tensor_name(prefix.rpartition(".")[0])] = module
        bases.state |= {joined(prefix, name) for name in module.state_dict()}
    return bases


def tensor_name(prefix: str) -> str:
    """Return the parametrised tensor's name, from that of its list of parametrisations.

    >>> tensor_name("a.b.parametrizations.weight"), tensor_name("parametrizations.bias")
    ('a.b.weight', 'bias')
    """
    holder, _, leaf = prefix.rpartition(".")
    return joined(holder.rpartition("parametrizations")[0].rstrip("."), leaf)


def joined(prefix: str, name: str) -> str:
    """Return a name behind a module's."""
    return f"{prefix}.{name}" if prefix else name
