"""Multiply by a SeedLM weight straight from its seeds and codes; see `matmul_reference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from seedpack.kernels.common.row_tiles import Product
from seedpack.kernels.dispatch import Backend, can_run, kernels_for
from seedpack.kernels.seedlm.code import SeedLMCode, SeedLMParts


def seedlm_matmul(x: Tensor, parts: SeedLMParts, code: SeedLMCode, *, backend: Backend = "auto") -> Tensor:
    """Multiply x [tokens, columns] by the weight [rows, columns] transposed, in the dtype of x."""
    return kernels_for("seedlm.matmul", backend, x.device, code.unable).matmul(x, parts, code)


def seedlm_prepare(
    parts: SeedLMParts, code: SeedLMCode, *, columns: int, bias: Tensor | None, planes: int, kept: Sequence[Tensor]
) -> Product | None:
    """Return `seedlm_matmul` for few tokens, plus bias [rows], as a function to be called again and again.

    It takes contiguous x [..., columns], float32 or bfloat16, which it rounds to 8 bits, or in two planes to 16, and returns
    None once `kept` have other bytes. None where nothing is compiled for these tensors, or for this processor.
    """
    if not can_run("cpu", parts.seeds.device):
        return None
    prepare: Any = kernels_for("seedlm.few_tokens", "cpu", parts.seeds.device).prepare
    return prepare(parts, code, columns, bias, planes, kept)  # type: ignore[no-any-return]


def seedlm_matmul_transposed(
    grad: Tensor, parts: SeedLMParts, code: SeedLMCode, *, columns: int, backend: Backend = "auto"
) -> Tensor:
    """Multiply grad [tokens, rows] by the weight [rows, columns]: the gradient to x, in the dtype of grad."""
    kernels = kernels_for("seedlm.matmul", backend, grad.device, code.unable)
    return kernels.matmul_transposed(grad, parts, code, columns)
