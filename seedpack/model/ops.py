"""The packed product as torch operators: opaque to the compiler, with a gradient to the input.

Opaque, because Inductor may compile the wrapping integers of a generator wrongly. The codec travels as its JSON text,
its parts in the order of `Codec.parts`. The backward pass decodes again; no dense weight lives between the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seedpack.codecs.registry import codec_from_json


@torch.library.custom_op("seedpack::decode", mutates_args=())
def _decode(parts: list[Tensor], codec: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    decoder = codec_from_json(codec)
    matrix = (shape[0], shape[1])
    named = dict(zip(decoder.parts(matrix), parts, strict=True))
    return decoder.decode(named, matrix, dtype).contiguous()


@_decode.register_fake
def _(parts: list[Tensor], codec: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=parts[0].device)


@torch.library.custom_op("seedpack::linear", mutates_args=())
def _linear(x: Tensor, parts: list[Tensor], bias: Tensor | None, codec: str, shape: list[int]) -> Tensor:
    decoder = codec_from_json(codec)
    matrix = (shape[0], shape[1])
    named = dict(zip(decoder.parts(matrix), parts, strict=True))
    return decoder.matmul(x, named, matrix, bias).contiguous()


@_linear.register_fake
def _(x: Tensor, parts: list[Tensor], bias: Tensor | None, codec: str, shape: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parts, _, ctx.codec, ctx.shape = inputs
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    grad_x = grad @ _decode(parts, ctx.codec, ctx.shape, grad.dtype) if ctx.needs_input_grad[0] else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return grad_x, [None] * len(parts), grad_bias, None, None


_linear.register_autograd(_backward, setup_context=_setup_context)


def decode(parts: list[Tensor], codec: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The dense weight [out, in]."""
    return _decode(parts, codec, list(shape), dtype)  # type: ignore[no-any-return]


def linear(x: Tensor, parts: list[Tensor], codec: str, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    """x [..., in] times the packed weight [out, in] transposed, plus bias [out]; differentiable in x and bias."""
    return _linear(x, parts, bias, codec, list(shape))  # type: ignore[no-any-return]
