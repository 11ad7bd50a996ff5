"""The packed product as torch operators: opaque to the compiler, with a gradient to the input.

`seedpack::decode` hides integer generators from Inductor, which may compile wrapping arithmetic wrongly.
`packed_linear` decodes again in the backward pass instead of keeping the dense weight alive between the two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seedpack.codecs.base import Codec
from seedpack.codecs.registry import codec_from_json, codec_to_json


@torch.library.custom_op("seedpack::decode", mutates_args=())
def _decode(parts: list[Tensor], codec: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    decoder = codec_from_json(codec)
    names = list(decoder.parts((shape[0], shape[1])))
    return decoder.decode(dict(zip(names, parts, strict=True)), (shape[0], shape[1]), dtype).contiguous()


@_decode.register_fake
def _(parts: list[Tensor], codec: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=parts[0].device)


def decode(codec: Codec, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The dense weight [out, in] of a codec's parts."""
    ordered = [parts[name] for name in codec.parts(shape)]
    return _decode(ordered, codec_to_json(codec), list(shape), dtype)  # type: ignore[no-any-return]


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, codec: str, out: int, columns: int, *parts: Tensor
    ) -> Tensor:
        ctx.codec, ctx.shape = codec, [out, columns]
        ctx.save_for_backward(*parts)
        return F.linear(x, _decode(list(parts), codec, [out, columns], x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        parts = list(ctx.saved_tensors)
        grad_x = grad @ _decode(parts, ctx.codec, ctx.shape, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None, None, *(None for _ in parts)


def packed_linear(
    x: Tensor, codec: Codec, parts: dict[str, Tensor], shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """x [..., in] times the packed weight [out, in] transposed, plus bias; differentiable in x and bias."""
    if not torch.is_grad_enabled() or not (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = codec.matmul(x, parts, shape) if _keeps_factors(codec) else F.linear(x, decode(codec, parts, shape, x.dtype))
        return y if bias is None else y + bias
    ordered = [parts[name] for name in codec.parts(shape)]
    return _PackedLinear.apply(x, bias, codec_to_json(codec), *shape, *ordered)  # type: ignore[no-any-return,no-untyped-call]


def _keeps_factors(codec: Codec) -> bool:
    """Whether the codec's own product is cheaper than decoding (a low rank) and free of hidden integers."""
    return codec.id == "svd" and getattr(codec, "factors", None) is None
