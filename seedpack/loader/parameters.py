"""Any other parameter that stays packed: of modules that are no layers of `layers.py`, such as experts, attention or an LSTM.

A module that holds one becomes a subclass of its own class, in which the parameter's name is a property: it answers as the
dense parameter would (`weight.PackedWeight`). Indexing a stack of matrices gives one of them, still packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from seedpack._shapes import require_columns
from seedpack.codecs.base import Codec, Parts
from seedpack.codecs.registry import codec_to_json
from seedpack.codecs.stack import StackCodec
from seedpack.errors import ModelError
from seedpack.loader import ops
from seedpack.loader.holder import NO_VALUES, PartHolder
from seedpack.loader.layers import (
    LAYERS,
    PackedLinear,
    PackedModule,
    as_parameter,
    codec_matrix,
    empty_part,
    memory_name,
    pack_module_,
    packed_class,
    unpack_module_,
)
from seedpack.loader.weight import PackedWeight, read_only


@dataclass(frozen=True)
class Piece:
    """Some rows of a packed parameter, or all of them, under one codec.

    Attributes:
        prefix: of the names of its parts in memory.
        codec: of the parts.
        shape: of the rows, dense.
        transposed: the codec saw the matrix transposed.
        matrix: the shape that the codec sees.
        text: the codec as operators take it.
        names: the names of its parts in memory, by part.
    """

    prefix: str
    codec: Codec
    shape: tuple[int, ...]
    transposed: bool = False
    matrix: tuple[int, int] = field(init=False, repr=False)
    text: str = field(init=False, repr=False)
    names: dict[str, str] = field(init=False, repr=False, hash=False)

    def __post_init__(self) -> None:
        matrix = codec_matrix(self.shape, self.transposed)
        names = {part: f"{self.prefix}_{memory_name(part)}" for part in self.codec.parts(matrix)}
        for name, value in (("matrix", matrix), ("text", codec_to_json(self.codec)), ("names", names)):
            object.__setattr__(self, name, value)  # once, so that neither a forward pass nor a compiler does it

    @cached_property
    def one(self) -> Piece | None:
        """One matrix of these, or None if they are no stack of three axes with that of matrices first."""
        if not isinstance(self.codec, StackCodec) or len(self.shape) != 3:
            return None
        if (self.codec.matrix_rows, self.codec.matrix_columns) != self.shape[1:]:
            return None
        return Piece(self.prefix, self.codec.inner, self.shape[1:], self.codec.transposed)


class PackedTensor:
    """A packed parameter, or one matrix of it: the owner of the `PackedWeight` that stands for it.

    Args:
        pieces: its rows, one piece after the other, with their parts.
        dtype: of decoded values.
        int8: activations are rounded in products, see `ops.linear`.
    """

    def __init__(self, pieces: Sequence[tuple[Piece, Parts]], dtype: torch.dtype, int8: bool | None = None):
        first, rows = pieces[0][0].shape, sum(piece.shape[-2] for piece, _ in pieces)
        self._int8 = int8
        self._matrices: dict[int, tuple[list[int], PackedTensor]] = {}
        self._pieces, self.compute_dtype = pieces, dtype
        self.weight_shape = first if len(pieces) == 1 else (*first[:-2], rows, first[-1])
        self.transposed = any(piece.transposed for piece, _ in pieces)

    @property
    def device(self) -> torch.device:
        """The device of the parts."""
        return self._pieces[0][1]["weight"].device

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Rebuild the parameter, in the dense shape."""
        rows = []
        for piece, parts in self._pieces:
            matrix = ops.decode(parts, piece.text, piece.matrix, dtype or self.compute_dtype)
            rows.append(matrix.mT.contiguous() if piece.transposed else matrix.view(piece.shape))
        return rows[0] if len(rows) == 1 else torch.cat(rows, -2)

    def product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Return input [..., in] times the transposed matrix [out, in], plus bias [out]."""
        if len(self._pieces) == 1:
            return self._linear(input, *self._pieces[0], bias)
        product = torch.cat([self._linear(input, piece, parts) for piece, parts in self._pieces], -1)
        return product if bias is None else product + bias.to(product.dtype)

    def product_from_left(self, input: Tensor) -> Tensor:
        """Return input [..., in] times the matrix [in, out]."""
        if not self.transposed or len(self._pieces) != 1:
            return input @ self.dense_weight(input.dtype)
        return self._linear(input, *self._pieces[0])

    def _linear(self, input: Tensor, piece: Piece, parts: Parts, bias: Tensor | None = None) -> Tensor:
        require_columns("a packed matrix", input, piece.matrix[1])
        int8 = self._int8 if piece.codec.int8_activations or not self._int8 else None
        return ops.linear(input, [*parts.values()], [*parts], piece.codec, piece.text, piece.matrix, bias, int8)

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows [..., in] of the matrix that an index [...] names."""
        if len(self._pieces) != 1:
            return self.dense_weight()[index]
        ((piece, parts),) = self._pieces
        rows = ops.decode_rows(parts, index.flatten(), piece.text, piece.matrix, self.compute_dtype)
        return rows.view(*index.shape, piece.matrix[1])

    def at(self, index: int) -> PackedTensor | None:
        """Return one matrix of a stack, with parts that are views; None if this is no stack of three axes."""
        if any(piece.one is None for piece, _ in self._pieces):
            return None
        if not -(count := self.weight_shape[0]) <= index < count:
            raise IndexError(f"index {index} is out of range for a stack of {count} matrices")
        known, places = (
            self._matrices.get(index),
            [part.data_ptr() for _, parts in self._pieces for part in parts.values()],
        )
        if known is None or known[0] != places:  # kept, as products are prepared for what lies in one place
            pieces = [(cast(Piece, piece.one), StackCodec.at(parts, index)) for piece, parts in self._pieces]
            known = self._matrices[index] = places, PackedTensor(pieces, self.compute_dtype, self._int8)
        return known[1]


class PackedParameters(PartHolder):
    """Base of modules with packed parameters, beside their own class; `pack_parameter_` makes them.

    Attributes:
        pieces: by the name of the parameter.
        codebooks: the names of those that are buffers when dense.
        int8_activations: of products, see `ops.linear`.
        dense_class: the module's class before a parameter was packed.
    """

    pieces: dict[str, tuple[Piece, ...]]
    codebooks: frozenset[str]
    int8_activations: bool | None = None
    dense_class: type[nn.Module]

    def packed_tensor(self, leaf: str) -> PackedTensor:
        """Return the parameter of a name."""
        parts = [(piece, self.packed_parts(piece)) for piece in self.pieces[leaf]]
        return PackedTensor(parts, self.compute_dtype, self.int8_activations)

    def packed_parts(self, piece: Piece) -> Parts:
        """Return the parts of a piece, or those of the first levels."""
        found = {part: self._parameters.get(name) for part, name in piece.names.items()}
        return {part: value for part, value in found.items() if value is not None}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as `nn.Module` does when one is assigned; packed ones are none."""
        if name in self.pieces:
            raise read_only()
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """Return shape, codec and size of each packed parameter for `repr`, after what the module says of itself."""
        packed = [
            f"{leaf}: {list(piece.shape)}, {piece.codec}, {piece.codec.bits_per_weight(piece.matrix):.3f} bits per weight"
            for leaf, pieces in self.pieces.items()
            for piece in pieces
        ]
        return ", ".join(filter(None, [super().extra_repr(), *packed]))

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in cast(Any, super()).__getstate__().items() if name != "_views"}
        if isinstance(self, nn.RNNBase):
            state["_flat_weights"] = []
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _refresh(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.dense_class, tuple(self.pieces)), self.__getstate__()


def _view(module: PackedParameters, leaf: str) -> Tensor:
    """Return what stands for a packed parameter: the same tensor, as long as its parts are the same."""
    if torch.compiler.is_compiling():
        return module.packed_tensor(leaf).dense_weight()
    views: dict[str, tuple[tuple[object, ...], PackedWeight]] = module.__dict__.setdefault("_views", {})
    names = [name for piece in module.pieces[leaf] for name in piece.names.values()]
    state = (module.compute_dtype, module.int8_activations, *(module._parameters.get(name) for name in names))
    known = views.get(leaf)
    if known is None or any(a is not b for a, b in zip(known[0], state, strict=True)):
        owner = module.packed_tensor(leaf)
        known = views[leaf] = state, PackedWeight.of(owner, owner.device, keep=True)
    return known[1]


def _refuse(module: PackedParameters, value: object) -> None:
    raise read_only()


@cache
def _with_packed(dense: Any, leaves: tuple[str, ...]) -> type[Any]:
    properties = {leaf: property(partial(_view, leaf=leaf), _refuse) for leaf in leaves}
    name = (
        dense.__name__ if hasattr(dense, "save_pretrained") else f"Packed{dense.__name__}"
    )  # its config.json names the class
    return type(name, (PackedParameters, dense), {"__module__": __name__, **properties})


def _empty(dense: Any, leaves: tuple[str, ...]) -> nn.Module:
    """Return an object of the packed class of a module, for copies."""
    cls: type[nn.Module] = _with_packed(dense, leaves)
    return cls.__new__(cls)


def can_pack(module: nn.Module, leaf: str) -> bool:
    """Return whether a parameter of a module can stay packed."""
    if packed_class(module) is not None:
        return leaf == "weight"
    if isinstance(module, PackedModule) or (isinstance(module, LAYERS) and leaf == "weight"):
        return False  # a layer that has no packed form
    known = isinstance(module, PackedParameters) and leaf in module.pieces
    return known or isinstance(module._parameters.get(leaf), nn.Parameter) or is_codebook(module, leaf)


def is_codebook(module: nn.Module, leaf: str) -> bool:
    """Return whether a buffer of a module is a codebook, which transformers' audio codecs keep so and call `embed` (EnCodec, Mimi)."""
    held = leaf in module._buffers and leaf not in module._non_persistent_buffers_set
    return held and leaf.startswith("embed") and "codebook" in type(module).__name__.lower()


def pack_parameter_(
    module: nn.Module,
    leaf: str,
    pieces: Sequence[tuple[Piece, Parts | None]],
    dtype: torch.dtype | None = None,
) -> PackedParameters:
    """Turn a parameter of a module into a packed one, in place.

    Args:
        module: that holds it.
        leaf: its name.
        pieces: its rows, with their parts; None leaves these unfilled, for a loader.
        dtype: of decoded values; default the parameter's.
    """
    parameter: Tensor = getattr(module, leaf)
    for piece, given in pieces:
        if given is not None:
            piece.codec.check(given, piece.matrix)
    dense: Any = module.dense_class if isinstance(module, PackedParameters) else type(module)
    known = module.pieces if isinstance(module, PackedParameters) else {}
    codebooks = module.codebooks if isinstance(module, PackedParameters) else frozenset()
    for name in (name for piece, _ in pieces for name in piece.names.values()):
        if hasattr(module, name):
            raise ModelError(
                f"{name!r} is an attribute of a {dense.__name__}, and would be a part of {leaf!r}; leave it raw"
            )
    if is_codebook(module, leaf):
        codebooks |= {leaf}
    delattr(module, leaf)
    for piece, given in pieces:
        for part, spec in piece.codec.parts(piece.matrix).items():
            if given is None or part in given:
                value = empty_part(*spec, parameter.device) if given is None else given[part]
                module.register_parameter(piece.names[part], as_parameter(value, parameter.device))
    module.__class__ = _with_packed(dense, (*known, leaf))
    packed = cast(PackedParameters, module)
    packed.pieces, packed.codebooks = {**known, leaf: tuple(piece for piece, _ in pieces)}, codebooks
    packed.dense_class = dense
    packed.compute_dtype = dtype or parameter.dtype
    packed.put_float_first()
    _refresh(module)
    return packed


def pack_(
    module: nn.Module,
    leaf: str,
    codec: Codec,
    parts: Parts | None = None,
    *,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> PackedModule | PackedParameters:
    """Turn a parameter of a module into a packed one, in place: `pack_module_` for the weight of a layer, or as any other.

    Args:
        module: that holds it.
        leaf: its name.
        codec: of the parts.
        parts: or None, for a loader.
        transposed: the codec saw the matrix transposed; layers know that themselves.
        dtype: of decoded values; default the parameter's.
    """
    if packed_class(module) is not None:
        return pack_module_(module, codec, parts, dtype=dtype)
    piece = Piece(leaf, codec, tuple(getattr(module, leaf).shape), transposed)
    return pack_parameter_(module, leaf, [(piece, parts)], dtype)


def memory_names(module: nn.Module, leaf: str) -> dict[str, str]:
    """Return the names in memory of the parts of a packed parameter, by part."""
    if isinstance(module, PackedModule):
        return {part: memory_name(part) for part in module.part_names}
    assert isinstance(module, PackedParameters)
    return {part: name for piece in module.pieces[leaf] for part, name in piece.names.items()}


def packed_leaves(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a module that are packed."""
    if isinstance(module, PackedParameters):
        return tuple(module.pieces)
    return ("weight",) if isinstance(module, PackedModule) else ()


def product_codecs(module: nn.Module) -> list[Codec]:
    """Return the codecs of the matrices that a module multiplies by: those of a packed linear layer or of packed parameters."""
    if isinstance(module, PackedParameters):
        return [(piece.one or piece).codec for pieces in module.pieces.values() for piece in pieces]
    return [module.codec] if isinstance(module, PackedLinear) else []


def is_packed(module: nn.Module, leaf: str) -> bool:
    """Return whether a parameter of a module is packed."""
    return leaf in packed_leaves(module)


def unpack_(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Make a module's packed weight or parameters dense again, in place, if it has any."""
    if isinstance(module, PackedModule):
        unpack_module_(module, dtype)
    elif isinstance(module, PackedParameters):
        unpack_parameters_(module, dtype)


def check_(module: nn.Module) -> None:
    """Refuse parts of a module, if it has any, that their codecs cannot have written."""
    if isinstance(module, PackedModule):
        module.codec.check(module.packed_parts(), module.matrix)
    elif isinstance(module, PackedParameters):
        for pieces in module.pieces.values():
            for piece in pieces:
                piece.codec.check(module.packed_parts(piece), piece.matrix)


def unpack_parameters_(module: PackedParameters, dtype: torch.dtype | None = None) -> nn.Module:
    """Make the packed parameters of a module dense again, in place."""
    dense = {leaf: module.packed_tensor(leaf).dense_weight(dtype) for leaf in module.pieces}
    for pieces in module.pieces.values():
        for piece in pieces:
            for name in piece.names.values():
                del module._parameters[name]
    module._parameters.pop(NO_VALUES, None)
    module.__class__ = module.__dict__.pop("dense_class")
    codebooks = module.codebooks
    for name in ("pieces", "codebooks", "compute_dtype", "int8_activations", "_views"):
        module.__dict__.pop(name, None)
    for leaf, value in dense.items():
        if leaf in codebooks:
            module.register_buffer(leaf, value)
        else:
            module.register_parameter(leaf, nn.Parameter(value))
    _refresh(module)
    return module


def _refresh(module: nn.Module) -> None:
    """Have a recurrent network find its weights again, of which it keeps a list."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
