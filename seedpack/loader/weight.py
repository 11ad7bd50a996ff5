"""The weight of a packed layer as other code sees it: a read-only tensor without storage, decoded when its values are used."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from seedpack.errors import ModelError


class Layer(Protocol):
    """A packed layer, as far as its weight asks it."""

    weight_shape: tuple[int, ...]
    compute_dtype: torch.dtype
    transposed: bool

    def dense_weight(self) -> Tensor:
        """Rebuild the weight."""
        ...

    def product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Return input times the transposed weight, plus bias."""
        ...

    def rows(self, index: Tensor) -> Tensor:
        """Return rows of the weight."""
        ...


_QUESTIONS = {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.is_floating_point, Tensor.is_complex,
    Tensor.element_size, Tensor.is_contiguous, Tensor.stride, Tensor.storage_offset, Tensor.get_device, Tensor.is_inference,
    torch.is_floating_point, torch.numel, torch.is_complex,
}  # fmt: skip
_GETTERS = {
    getattr(Tensor, name).__get__: name
    for name in ("shape", "dtype", "device", "requires_grad", "grad", "ndim", "layout", "is_leaf", "grad_fn", "itemsize",
                 "nbytes", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "_version")
}  # fmt: skip
IN_PLACE_OPERATORS = {
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
}
_WRITERS = {"__set__", "__setitem__", "__delitem__"} | IN_PLACE_OPERATORS
_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]
_SAME = {Tensor.detach, Tensor.data.__get__, Tensor.contiguous}  # type: ignore[attr-defined]


_written: ContextVar[list[Layer] | None] = ContextVar("written", default=None)


@contextmanager
def recording_writes() -> Iterator[list[Layer]]:
    """Record the layers whose weights are written to, instead of refusing it; for trials on the meta device."""
    layers: list[Layer] = []
    token = _written.set(layers)
    try:
        yield layers
    finally:
        _written.reset(token)


class PackedWeight(Tensor):
    """The dense weight that a packed layer stands for.

    Shape, dtype and device are answered at once. Linear maps and lookups of rows go to the layer's own product; anything else
    is computed with the weight decoded. Writing is refused, because what is written into a decoded weight would be lost.
    """

    _owner: Callable[[], Layer | None]  # a layer keeps its weight, so not the other way round too
    _form: tuple[torch.Size, torch.dtype, torch.device]

    @staticmethod
    def of(layer: Layer, device: torch.device, *, keep: bool = False) -> PackedWeight:
        """Return the weight of a layer, in its compute dtype, on the device of its parts; with `keep` it keeps the layer."""
        make: Callable[..., PackedWeight] = Tensor._make_wrapper_subclass
        weight = make(PackedWeight, layer.weight_shape, dtype=layer.compute_dtype, device=device, requires_grad=False)
        weight._owner = (lambda: layer) if keep else weakref.ref(layer)
        weight._form = torch.Size(layer.weight_shape), layer.compute_dtype, device
        return weight

    def is_of(self, layer: object) -> bool:
        """Return whether this is the weight of a layer."""
        return self._owner() is layer

    @property
    def _layer(self) -> Layer:
        layer = self._owner()
        if layer is None:
            raise ModelError(
                "the packed layer that this weight belonged to is gone; keep the layer while its weight is used"
            )
        return layer

    shape = property(lambda self: self._form[0])  # asked for most: without a call of torch
    dtype = property(lambda self: self._form[1])
    device = property(lambda self: self._form[2])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what needs no values, send products to the layer, refuse writes, and decode for all else."""
        kwargs = kwargs or {}
        if func in _GETTERS or func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _SAME or _asks_for_no_gradient(func, args, kwargs):
            return args[0]
        own = _OWN_PRODUCTS.get(func)
        if own is not None and (found := own(*args, **kwargs)) is not None:
            return found
        if (written := _written_to(func, args, kwargs)) is not None:
            if (layers := _written.get()) is None:
                raise read_only()
            layers.append(written._layer)
            return written
        return func(*_decoded(args), **_decoded(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Decode for code that is beyond Python's functions, such as autograd's."""
        named = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **(kwargs or {})}
        written = (named.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write)
        if any(isinstance(value, PackedWeight) for value in written):
            raise read_only()
        return func(*_decoded(args), **_decoded(kwargs or {}))


def _asks_for_no_gradient(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call only says that a weight has no gradient, which it never has."""
    if func not in (Tensor.requires_grad_, _SET_REQUIRES_GRAD):
        return False
    return (*args[1:], *kwargs.values()) == (False,)


def _decoded(values: Any) -> Any:
    return tree_map_only(PackedWeight, lambda weight: weight._layer.dense_weight(), values)


def _written_to(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> PackedWeight | None:
    """Return the packed weight that a function of torch writes into, by its name and by what it is called with."""
    if isinstance(out := kwargs.get("out"), PackedWeight):
        return out
    name: str = getattr(func, "__name__", "")
    if not (name.endswith("_") and not name.endswith("__")) and name not in _WRITERS:
        return None
    first = args[0] if args else next(iter(kwargs.values()), None)  # torch.nn.init gives all by keyword
    candidates = first if isinstance(first, (list, tuple)) else [first]
    return next((value for value in candidates if isinstance(value, PackedWeight)), None)


def read_only() -> ModelError:
    """Return the error for writing to a packed weight."""
    return ModelError(
        "the weight of a packed layer is read-only: what is written into it would be lost; make the layer dense first "
        "(seedpack unpack, or model.dequantize() in transformers)"
    )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return the product by a packed layer's own kernels, where the weight is its matrix as it stands."""
    layer = weight._layer if isinstance(weight, PackedWeight) else None
    if layer is None or layer.transposed or len(layer.weight_shape) != 2 or isinstance(input, PackedWeight):
        return None
    return layer.product(input, bias)


def _embedding(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return rows of a packed layer, decoded alone."""
    layer = weight._layer if isinstance(weight, PackedWeight) else None
    max_norm = kwargs.get("max_norm", args[1] if len(args) > 1 else None)
    if layer is None or layer.transposed or len(layer.weight_shape) != 2 or max_norm is not None:
        return None
    return layer.rows(input)


def _matmul(input: Tensor, other: Tensor, **kwargs: Any) -> Tensor | None:
    """Return the product with a packed matrix that a model stores [in, out]."""
    layer = other._layer if isinstance(other, PackedWeight) else None
    product = getattr(layer, "product_from_left", None)
    if product is None or other.dim() != 2 or kwargs or isinstance(input, PackedWeight):
        return None
    return product(input)  # type: ignore[no-any-return]


_INDICES = (torch.int64, torch.int32, torch.int16, torch.int8)  # booleans, and bytes, are masks


def _matrix(weight: Tensor, index: Any) -> Tensor | None:
    """Return one matrix of a packed stack, still packed, or some of them, decoded alone."""
    layer = weight._layer if isinstance(weight, PackedWeight) else None
    at = getattr(layer, "at", None)
    if at is None or isinstance(index, bool):
        return None
    if isinstance(index, tuple) and index and isinstance(index[0], int) and not isinstance(index[0], bool):
        matrix = _matrix(weight, index[0])
        return None if matrix is None else matrix[index[1:]]
    if isinstance(index, int) or (isinstance(index, Tensor) and not index.dim() and index.dtype in _INDICES):
        found = at(int(index))
        return None if found is None else PackedWeight.of(found, weight.device, keep=True)
    if isinstance(index, Tensor) and index.dim() == 1 and index.dtype == torch.int64 and index.numel():
        used, places = index.unique(return_inverse=True)
        matrices = [at(i) for i in used.tolist()]
        return None if None in matrices else torch.stack([m.dense_weight() for m in matrices])[places]
    return None


_OWN_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {
    torch.nn.functional.linear: _linear,
    torch.nn.functional.embedding: _embedding,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__getitem__: _matrix,
}
