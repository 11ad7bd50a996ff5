"""Decode and multiply by packed weights as torch operators: opaque to the compiler, with a gradient to the input.

Opaque, because Inductor may compile the wrapping integers of a generator wrongly. The codec travels as its JSON text,
its parts as a list with their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from seedpack.codecs.base import Codec
from seedpack.codecs.prepared import few_tokens
from seedpack.codecs.registry import codec_from_json
from seedpack.errors import ModelError

_library = torch.library.Library("seedpack", "FRAGMENT")


def _operator(name: str, empty: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Any]:
    """Register a function as an operator, for every device, and one that gives an unfilled result, for compilers. It is called
    without what `torch.library.custom_op` wraps around a function, which takes as long as a small product."""

    def register(function: Callable[..., Tensor]) -> Any:
        _library.define(name + torch.library.infer_schema(function, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"seedpack::{name}", empty)
        return getattr(torch.ops.seedpack, name).default

    return register


def _named(parts: list[Tensor], names: str) -> dict[str, Tensor]:
    return dict(zip(names.split(","), parts, strict=True))


@_operator("decode", lambda parts, names, codec, shape, dtype: parts[0].new_empty(shape, dtype=dtype))
def _decode(parts: list[Tensor], names: str, codec: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    decoder = codec_from_json(codec)
    return decoder.decode(_named(parts, names), (shape[0], shape[1]), dtype).contiguous()


@_operator(
    "decode_rows",
    lambda parts, names, index, codec, shape, dtype: parts[0].new_empty((index.shape[0], shape[1]), dtype=dtype),
)
def _decode_rows(
    parts: list[Tensor], names: str, index: Tensor, codec: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    decoder = codec_from_json(codec)
    if index.is_cpu and index.numel() and int(index.min()) < 0:
        raise IndexError(f"embedding index {int(index.min())} is out of range")
    return decoder.decode_rows(_named(parts, names), index, (shape[0], shape[1]), dtype).contiguous()


def product(
    x: Tensor,
    parts: Sequence[Tensor],
    names: Sequence[str],
    codec: Codec,
    shape: tuple[int, int],
    bias: Tensor | None,
    int8: bool | None,
) -> Tensor:
    """Do as `linear`, without a gradient."""
    if int8 is not False:
        planes = 1 if int8 or codec.int8_by_default else 2
        if (y := few_tokens(codec, x, parts, names, shape, bias, planes)) is not None:
            return y
    rounds = codec.rounds_many(x) if int8 is None else int8
    options: dict[str, Any] = {"int8": True} if rounds else {}
    return codec.matmul(x, dict(zip(names, parts, strict=True)), shape, bias, **options).contiguous()


@_operator("linear", lambda x, parts, names, bias, codec, shape, int8: x.new_empty((*x.shape[:-1], shape[0])))
def _linear(
    x: Tensor, parts: list[Tensor], names: str, bias: Tensor | None, codec: str, shape: list[int], int8: bool | None
) -> Tensor:
    return product(x, parts, names.split(","), codec_from_json(codec), (shape[0], shape[1]), bias, int8)


@_operator("linear_transposed", lambda grad, parts, names, codec, shape: grad.new_empty((*grad.shape[:-1], shape[1])))
def _linear_transposed(grad: Tensor, parts: list[Tensor], names: str, codec: str, shape: list[int]) -> Tensor:
    decoder = codec_from_json(codec)
    return decoder.matmul_transposed(grad, _named(parts, names), (shape[0], shape[1])).contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parts, ctx.names, _, ctx.codec, ctx.shape, _ = inputs
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts, grad_x = list(ctx.saved_tensors), None
    if ctx.needs_input_grad[0]:
        if is_legacy_batchedtensor(grad):  # of is_grads_batched, which knows no operators on lists of tensors
            grad_x = grad @ _decode(parts, ctx.names, ctx.codec, ctx.shape, grad.dtype)
        else:
            grad_x = _linear_transposed(grad, parts, ctx.names, ctx.codec, ctx.shape)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
    return grad_x, [None] * len(parts), None, grad_bias, None, None, None


torch.library.register_autograd(_linear.name(), _backward, setup_context=_setup_context)


def _setup_transposed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parts, ctx.names, ctx.codec, ctx.shape = inputs
    ctx.save_for_backward(*parts)


def _backward_transposed(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    grad_y = _linear(grad, parts, ctx.names, None, ctx.codec, ctx.shape, False) if ctx.needs_input_grad[0] else None
    return grad_y, [None] * len(parts), None, None, None


torch.library.register_autograd(_linear_transposed.name(), _backward_transposed, setup_context=_setup_transposed)


def _require_unbatched(*dims: Any) -> None:
    """Refuse a torch.vmap over more than an operator's first argument."""
    if any(dim is not None for entry in dims for dim in (entry if isinstance(entry, list) else [entry])):
        raise ModelError(
            "torch.vmap maps over the parts of a packed layer, which it can do over its input and its bias; make the layer "
            "dense first (seedpack unpack, or model.dequantize() in transformers)"
        )


@torch.library.register_vmap(_decode_rows)  # type: ignore[untyped-decorator]
def _(
    info: Any, in_dims: Any, parts: list[Tensor], names: str, index: Tensor, *rest: Any
) -> tuple[Tensor, int]:  # index [n]
    _require_unbatched(in_dims[0])
    index = index.movedim(in_dims[2], 0)
    rows: Tensor = _decode_rows(parts, names, index.flatten(), *rest)
    return rows.view(*index.shape, rows.shape[-1]), 0


class _Product(torch.autograd.Function):
    """The product as torch.func and forward-mode derivatives take it, which know nothing of operators' gradients.

    `transposed` multiplies by the weight itself, without a bias.
    """

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        transposed: bool,
        int8: bool | None,
        names: str,
        codec: str,
        shape: list[int],
        *parts: Tensor,
    ) -> Tensor:
        if transposed:
            return _linear_transposed(x, list(parts), names, codec, shape)  # type: ignore[no-any-return]
        return _linear(x, list(parts), names, bias, codec, shape, int8)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.transposed, ctx.settings, ctx.output_shape = inputs[2], inputs[4:7], output.shape
        ctx.save_for_backward(*inputs[7:])
        ctx.save_for_forward(*inputs[7:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        back = grad_bias = None
        if ctx.needs_input_grad[0]:
            back = _apply(grad, None, not ctx.transposed, False, *ctx.settings, *ctx.saved_tensors)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return back, grad_bias, *[None] * (5 + len(ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, *_: Any) -> Any:
        y = None if x is None else _apply(x, None, ctx.transposed, False, *ctx.settings, *ctx.saved_tensors)
        if bias is None:
            return y
        return bias.expand(ctx.output_shape).clone() if y is None else y + bias

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, int | None]:
        _require_unbatched(*in_dims[2:])
        of_x, of_bias = in_dims[:2]
        if of_x is not None:
            x = x.movedim(of_x, 0)
        if bias is None or of_bias is None:
            return _apply(x, bias, *rest), None if of_x is None else 0
        y = _apply(x, None, *rest)
        y = y if of_x is not None else y.unsqueeze(0)
        bias = bias.movedim(of_bias, 0)
        return y + bias.view(len(bias), *[1] * (y.dim() - 2), -1), 0


_apply: Callable[..., Any] = _Product.apply


def is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Return whether a product needs nothing of an operator: no gradient, compiler, transform, mode or subclass is at hand."""
    return (
        type(x) is Tensor
        and not is_compiling()
        and not (is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not (torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state())
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and not _are_functorch_transforms_active()
    )


def decode(parts: Mapping[str, Tensor], codec: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Decode the dense weight [out, in]."""
    return _decode(list(parts.values()), ",".join(parts), codec, list(shape), dtype)  # type: ignore[no-any-return]


def decode_rows(
    parts: Mapping[str, Tensor], index: Tensor, codec: str, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Decode the rows [n, in] of the weight [out, in] that an index [n] names."""
    return _decode_rows(list(parts.values()), ",".join(parts), index, codec, list(shape), dtype)  # type: ignore[no-any-return]


def linear(
    x: Tensor,
    parts: Sequence[Tensor],
    names: Sequence[str],
    codec: Codec,
    text: str,
    shape: tuple[int, int],
    bias: Tensor | None,
    int8: bool | None,
) -> Tensor:
    """Multiply x [..., in] by the packed weight [out, in], transposed, and add bias [out]; differentiable in both.

    With `int8` x is rounded to 8 bits, which the gradient ignores; None: for few tokens on the CPU, to 8 bits where that costs
    little, else to 16. Under autocast x has its dtype, as in nn.Linear. `text` is the codec as operators take it.
    """
    if x.is_cpu and is_plain(x, bias):
        return product(x, parts, names, codec, shape, bias, int8)
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    joined = ",".join(names)
    if forward_ad._current_level >= 0 or _are_functorch_transforms_active():
        return _apply(x, bias, False, int8, joined, text, list(shape), *parts)  # type: ignore[no-any-return]
    y = _linear(x, list(parts), joined, bias, text, list(shape), int8)
    if y.requires_grad and not torch.compiler.is_compiling():
        y = torch.ops.aten._unsafe_view(y, y.shape)  # autograd refuses to write into a view of what an operator returns
    return y  # type: ignore[no-any-return]
