"""Multiply by a trellis weight in its rotated basis, straight from its stream; see `matmul_reference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seedpack.kernels.common.row_tiles import Product
from seedpack.kernels.dispatch import Backend, can_run, kernels_for
from seedpack.kernels.trellis.code import TrellisCode


def trellis_matmul(
    x: Tensor,
    stream: Tensor,
    scale: Tensor,
    code: TrellisCode,
    *,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Multiply x [tokens, columns] by the weight [rows, columns] transposed.

    Args:
        x: activations in the rotated basis, float32.
        stream: the weight's, as for `trellis_decode`.
        scale: float32 [rows], of the integers.
        code: the weight's.
        dtype: of the result. Where it has 16 bits, products for many tokens may be made of float16.
        int8: round activations to 8 bits in groups of 256; faster on GPUs.
        backend: which kernels to use.
    """
    return kernels_for("trellis.matmul", backend, x.device).matmul(x, stream, scale, code, dtype, int8)


def trellis_linear(
    x: Tensor,
    factor: Tensor,
    stream: Tensor,
    scale: Tensor,
    code: TrellisCode,
    *,
    int8: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Multiply `mix(x, factor)` by the weight transposed, in the dtype of x: the whole product of a trellis layer."""
    kernels = kernels_for("trellis.matmul", backend, x.device)
    return kernels.linear(x, factor, stream, scale, code, int8, backend)


def trellis_prepare(
    stream: Tensor,
    scale: Tensor,
    factor: Tensor,
    code: TrellisCode,
    *,
    columns: int,
    bias: Tensor | None,
    planes: int,
    kept: Sequence[Tensor],
) -> Product | None:
    """Return `trellis_linear` for few tokens, plus bias [rows], as a function to be called again and again.

    It takes contiguous x [..., columns], float32 or bfloat16, which it rounds to 8 bits, or in two planes to 16, and returns
    None once `kept`, the parts that all but the stream come from, have other bytes. None where nothing is compiled for these
    tensors, or where the mixing takes matrices too large for it.
    """
    if not can_run("cpu", stream.device):
        return None
    prepare: Any = kernels_for("trellis.few_tokens", "cpu", stream.device).prepare
    return prepare(stream, scale, factor, code, columns, bias, planes, kept)  # type: ignore[no-any-return]


def trellis_matmul_transposed(
    grad: Tensor,
    stream: Tensor,
    scale: Tensor,
    code: TrellisCode,
    *,
    columns: int,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Tensor:
    """Multiply grad [tokens, rows], float32, by the weight [rows, columns]: the gradient to x, in the rotated basis."""
    kernels = kernels_for("trellis.matmul", backend, grad.device)
    return kernels.matmul_transposed(grad, stream, scale, code, columns, dtype)
