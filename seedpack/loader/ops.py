"""Decode and multiply by packed weights as torch operators: opaque to the compiler, with a gradient to the input.

Opaque, because Inductor may compile the wrapping integers of a generator wrongly. The codec travels as its JSON text,
its parts as a list with their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from seedpack.codecs.registry import codec_from_json
from seedpack.errors import ModelError


def _named(parts: list[Tensor], names: str) -> dict[str, Tensor]:
    return dict(zip(names.split(","), parts, strict=True))


@torch.library.custom_op("seedpack::decode", mutates_args=())
def _decode(parts: list[Tensor], names: str, codec: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    decoder = codec_from_json(codec)
    return decoder.decode(_named(parts, names), (shape[0], shape[1]), dtype).contiguous()


@_decode.register_fake
def _(parts: list[Tensor], names: str, codec: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=parts[0].device)


@torch.library.custom_op("seedpack::decode_rows", mutates_args=())
def _decode_rows(
    parts: list[Tensor], names: str, index: Tensor, codec: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    decoder = codec_from_json(codec)
    return decoder.decode_rows(_named(parts, names), index, (shape[0], shape[1]), dtype).contiguous()


@_decode_rows.register_fake
def _(parts: list[Tensor], names: str, index: Tensor, codec: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(index.shape[0], shape[1], dtype=dtype, device=parts[0].device)


@torch.library.custom_op("seedpack::linear", mutates_args=())
def _linear(
    x: Tensor, parts: list[Tensor], names: str, bias: Tensor | None, codec: str, shape: list[int], int8: bool
) -> Tensor:
    decoder = codec_from_json(codec)
    options: dict[str, Any] = {"int8": True} if int8 else {}
    return decoder.matmul(x, _named(parts, names), (shape[0], shape[1]), bias, **options).contiguous()


@_linear.register_fake
def _(
    x: Tensor, parts: list[Tensor], names: str, bias: Tensor | None, codec: str, shape: list[int], int8: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.custom_op("seedpack::linear_transposed", mutates_args=())
def _linear_transposed(grad: Tensor, parts: list[Tensor], names: str, codec: str, shape: list[int]) -> Tensor:
    decoder = codec_from_json(codec)
    return decoder.matmul_transposed(grad, _named(parts, names), (shape[0], shape[1])).contiguous()


@_linear_transposed.register_fake
def _(grad: Tensor, parts: list[Tensor], names: str, codec: str, shape: list[int]) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parts, ctx.names, _, ctx.codec, ctx.shape, _ = inputs
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    grad_x = _linear_transposed(grad, parts, ctx.names, ctx.codec, ctx.shape) if ctx.needs_input_grad[0] else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
    return grad_x, [None] * len(parts), None, grad_bias, None, None, None


_linear.register_autograd(_backward, setup_context=_setup_context)


def _setup_transposed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parts, ctx.names, ctx.codec, ctx.shape = inputs
    ctx.save_for_backward(*parts)


def _backward_transposed(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    grad_y = _linear(grad, parts, ctx.names, None, ctx.codec, ctx.shape, False) if ctx.needs_input_grad[0] else None
    return grad_y, [None] * len(parts), None, None, None


_linear_transposed.register_autograd(_backward_transposed, setup_context=_setup_transposed)


def _batched(op: Any) -> Callable[..., tuple[Tensor, int]]:
    """Return the rule of an operator whose first argument may have any leading axes, under torch.vmap over that one alone."""

    def rule(info: Any, in_dims: tuple[Any, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        if in_dims[0] is None or any(
            dim is not None for dims in in_dims[1:] for dim in (dims if isinstance(dims, list) else [dims])
        ):
            raise ModelError(
                "torch.vmap maps over the parts or the bias of a packed layer, which it can do over the input alone; make the "
                "layer dense first (seedpack unpack, or model.dequantize() in transformers)"
            )
        return op(x.movedim(in_dims[0], 0), *rest), 0

    return rule


torch.library.register_vmap(_linear, _batched(_linear))
torch.library.register_vmap(_linear_transposed, _batched(_linear_transposed))


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
    parts: Mapping[str, Tensor],
    codec: str,
    shape: tuple[int, int],
    bias: Tensor | None,
    int8: bool = False,
) -> Tensor:
    """Multiply x [..., in] by the packed weight [out, in], transposed, and add bias [out]; differentiable in both.

    With `int8` x is rounded to 8 bits, which the gradient ignores. Under autocast x has its dtype, as in nn.Linear.
    """
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    rest = list(parts.values()), ",".join(parts)
    if forward_ad._current_level >= 0:
        x, tangent = forward_ad.unpack_dual(x)
        if tangent is not None:
            y = _linear(x, *rest, bias, codec, list(shape), int8)
            return forward_ad.make_dual(y, _linear(tangent, *rest, None, codec, list(shape), False))  # type: ignore[no-any-return]
    y = _linear(x, *rest, bias, codec, list(shape), int8)
    if y.requires_grad and not torch.compiler.is_compiling():
        y = torch.ops.aten._unsafe_view(y, y.shape)  # autograd refuses to write into a view of what an operator returns
    return y  # type: ignore[no-any-return]
