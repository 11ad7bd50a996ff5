"""Layers that stay packed in memory: each packs a dense module in place and rebuilds its weight in the forward pass.

The packed classes are subclasses of the dense ones, and the parts are parameters without gradient (offloaded and
mapped to devices like any other; integers, so no cast touches them). The principal part, which a file holds under the
weight's own name, is called `packed` in memory; `weight` answers as the dense weight would (`weight.PackedWeight`).
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from seedpack._shapes import require_columns
from seedpack.codecs.base import Codec, matrix_shape
from seedpack.codecs.registry import codec_to_json
from seedpack.dtypes import TORCH_DTYPES
from seedpack.errors import ModelError
from seedpack.formats.manifest import PRINCIPAL_PART
from seedpack.loader import ops
from seedpack.loader.holder import NO_VALUES, PartHolder
from seedpack.loader.weight import PackedWeight, read_only

PRINCIPAL = "packed"


def memory_name(part: str) -> str:
    """Return the name of the parameter that a part is in memory.

    >>> memory_name("weight"), memory_name("scales")
    ('packed', 'scales')
    """
    return PRINCIPAL if part == PRINCIPAL_PART else part


class PackedModule(PartHolder):
    """Base of packed layers, which `pack_module_` makes, never a constructor.

    Attributes:
        codec: decodes the parts; `codec_text`: the same, as operators take it.
        part_names: parameters of the module that are the codec's parts; `held_names`: how they are called there.
        weight_shape: of the dense weight.
        matrix: its shape [out, in] as the codec sees it.
        transposed: the dense weight is [in, out].
        compute_dtype: of the decoded weight.
        dense_class: the module's class before it was packed.
    """

    codec: Codec
    codec_text: str
    part_names: tuple[str, ...]
    held_names: tuple[str, ...]
    weight_shape: tuple[int, ...]
    matrix: tuple[int, int]
    transposed: bool
    compute_dtype: torch.dtype
    dense_class: type[nn.Module]
    int8_activations: bool | None = None  # of linear layers, see `ops.linear`

    def packed_parts(self) -> dict[str, Tensor]:
        """Return the parts, by name."""
        held = self._parameters
        return {name: cast(Tensor, held[key]) for name, key in zip(self.part_names, self.held_names, strict=True)}

    @property
    def weight(self) -> Tensor:
        """The dense weight, read-only; its values are decoded when they are used."""
        if torch.compiler.is_compiling():
            return self.dense_weight()
        known, device = self.__dict__.get("_weight"), cast(Tensor, self._parameters[PRINCIPAL]).device
        if known is None or known.dtype != self.compute_dtype or known.device != device:
            known = self.__dict__["_weight"] = PackedWeight.of(self, device)
        return known

    @weight.setter
    def weight(self, value: object) -> None:
        raise read_only()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_weight"}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) in FUSED.values():
            return super().__reduce_ex__(protocol)
        return _empty, (self.dense_class,), self.__getstate__()  # of a class that was made for it

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as `nn.Module` does when one is assigned; `weight` is none."""
        if name == "weight":
            raise read_only()
        super().register_parameter(name, param)

    def product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Return input [..., in] times the transposed weight [out, in], plus bias [out]."""
        if not input.is_floating_point() or input.shape[-1] != self.matrix[1]:
            self._require_float(input)
            require_columns("a packed Linear", input, self.matrix[1])
        held: dict[str, Any] = self._parameters
        parts = [held[name] for name in self.held_names]
        return ops.linear(
            input, parts, self.part_names, self.codec, self.codec_text, self.matrix, bias, self.int8_activations
        )

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows [..., in] of the weight that an index [...] names; no others are decoded."""
        rows = ops.decode_rows(self.packed_parts(), index.flatten(), self.codec_text, self.matrix, self.compute_dtype)
        return rows.view(*index.shape, self.matrix[1])

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Rebuild the weight, in the dense layer's shape."""
        weight = ops.decode(self.packed_parts(), self.codec_text, self.matrix, dtype or self.compute_dtype)
        return weight.mT.contiguous() if self.transposed else weight.view(self.weight_shape)

    def _require_float(self, x: Tensor) -> None:
        """Refuse an input of integers: some models cast it to the dtype of the weight, which is packed here."""
        if not x.is_floating_point():
            raise ModelError(
                f"a packed {self.dense_class.__name__} got an input of {x.dtype}: the model casts it to the dtype of the "
                "weight, which is packed here; leave this layer raw (--exclude)"
            )

    def extra_repr(self) -> str:
        """Return shape, codec and size for `repr`."""
        bits = self.codec.bits_per_weight(self.matrix)
        return f"{list(self.weight_shape)}, {self.codec}, {bits:.3f} bits per weight"


class PackedLinear(PackedModule, nn.Linear):
    """A packed nn.Linear, or a packed transformers Conv1D (then the codec saw it transposed)."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return self.product(input, self._parameters["bias"])


class PackedEmbedding(PackedModule, nn.Embedding):
    """A packed nn.Embedding: only the rows looked up are decoded."""

    def forward(self, input: Tensor) -> Tensor:
        """Map indices [...] to [..., embedding_dim]."""
        return self.rows(input)


class PackedConv1d(PackedModule, nn.Conv1d):
    """A packed nn.Conv1d."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [N, in_channels, L] to [N, out_channels, L']."""
        self._require_float(input)
        result: Tensor = self._conv_forward(input, self.dense_weight(input.dtype), self.bias)
        return result


class PackedConv2d(PackedModule, nn.Conv2d):
    """A packed nn.Conv2d."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, H', W']."""
        self._require_float(input)
        result: Tensor = self._conv_forward(input, self.dense_weight(input.dtype), self.bias)
        return result


LAYERS = (
    nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
FUSED: dict[type[Any], type[PackedModule]] = {
    nn.Linear: PackedLinear, nn.Embedding: PackedEmbedding, nn.Conv1d: PackedConv1d, nn.Conv2d: PackedConv2d,
}  # fmt: skip


def codec_matrix(shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    """Return the shape [out, in] of a weight as a codec sees it."""
    rows, columns = matrix_shape(shape)
    return (columns, rows) if transposed else (rows, columns)


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module stores its weight [in, out], as transformers' Conv1D does.

    That class is known by its name alone: transformers is not imported here.
    """
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def packed_class(module: nn.Module) -> type[PackedModule] | None:
    """Return the packed class of a dense module, or None for one that has no weight to pack.

    A layer with a forward pass of its own keeps it, and finds its weight packed.
    """
    if is_transposed(module):
        return PackedLinear
    if not isinstance(module, LAYERS) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return None
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return None  # it rescales its rows in place
    for dense, packed in FUSED.items():
        if isinstance(module, dense) and type(module).forward is dense.forward:
            return packed
    return _with_own_forward(cast(Hashable, type(module)))


@cache
def _with_own_forward(dense: Any) -> type[PackedModule]:
    return type(f"Packed{dense.__name__}", (PackedModule, dense), {})


def _empty(dense: Any) -> nn.Module:
    """Return an object of the packed class of a layer with a forward pass of its own, for copies."""
    cls = _with_own_forward(dense)
    return cls.__new__(cls)


def pack_module_(
    module: nn.Module,
    codec: Codec,
    parts: dict[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    some_rows: bool = False,
) -> PackedModule:
    """Turn a dense module into its packed class, in place.

    Args:
        module: one that `packed_class` knows; its `weight` gives shape and device.
        codec: how the parts are to be decoded.
        parts: the codec's parts, or those of the first levels; None leaves all unfilled, for a loader.
        dtype: of the decoded weight; default the weight's.
        some_rows: the parts are those that `Codec.rows` has cut from a larger weight, and are checked already.
    """
    cls = packed_class(module)
    if cls is None:
        raise ModelError(f"a {type(module).__qualname__} has no packed form; leave it dense")
    weight = cast(Tensor, module.weight)
    shape, transposed = tuple(weight.shape), is_transposed(module)
    matrix = codec_matrix(shape, transposed)
    if parts is not None and not some_rows:
        codec.check(parts, matrix)
    dense_class = type(module)
    del module._parameters["weight"]
    module.__class__ = cls
    packed = cast(PackedModule, module)
    specs = codec.parts(matrix)
    if parts is None:
        parts = {name: empty_part(*spec, weight.device) for name, spec in specs.items()}
    names = [*(name for name in specs if name in parts), *(name for name in parts if name not in specs)]
    packed.codec, packed.codec_text, packed.part_names = codec, codec_to_json(codec), tuple(names)
    packed.held_names = tuple(map(memory_name, names))
    packed.weight_shape, packed.matrix, packed.transposed = shape, matrix, transposed
    packed.compute_dtype, packed.dense_class = dtype or weight.dtype, dense_class
    if isinstance(packed, PackedLinear):
        packed.out_features, packed.in_features = matrix
    for name in names:
        module.register_parameter(memory_name(name), as_parameter(parts[name], weight.device))
    packed.put_float_first()
    return packed


def unpack_module_(module: PackedModule, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn a packed module back into its dense class, in place, with the weight rebuilt."""
    weight = module.dense_weight(dtype)
    for name in module.held_names:
        del module._parameters[name]
    module._parameters.pop(NO_VALUES, None)
    dense = cast(nn.Module, module)
    module.__dict__.pop("int8_activations", None)
    for name in (
        "codec",
        "codec_text",
        "part_names",
        "held_names",
        "weight_shape",
        "matrix",
        "transposed",
        "compute_dtype",
    ):
        delattr(module, name)
    module.__dict__.pop("_weight", None)
    dense.__class__ = module.__dict__.pop("dense_class")
    dense.register_parameter("weight", nn.Parameter(weight))
    return dense


def as_parameter(part: Tensor, device: torch.device) -> nn.Parameter:
    """Return a part as a parameter on a device, the same one if it is one already.

    A module on the meta device takes parts where they are.
    """
    value = part if device.type == "meta" else part.to(device)
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)


def empty_part(dtype: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return an unfilled part."""
    return torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=device)
