"""Multiply many tokens by a trellis weight in bytes; see `bytes_reference`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from seedpack.kernels.common.row_tiles import FEW_TOKENS
from seedpack.kernels.dispatch import Backend, kernels_for
from seedpack.kernels.rotation import mix
from seedpack.kernels.trellis.code import TrellisCode


@cache
def _multiplies_bytes() -> bool:
    """Return whether torch multiplies bytes by the processor's instruction for dots of them (VNNI): several times as fast as
    floats, and exactly, which its way without is not."""
    has: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return hasattr(torch, "_int_mm") and bool(has.get("avx512_vnni") or has.get("avx_vnni"))


def bytes_are_faster(x: Tensor) -> bool:
    """Return whether this machine multiplies activations x [..., columns] faster as bytes: many tokens on some CPUs."""
    return x.is_cpu and x.numel() > FEW_TOKENS * x.shape[-1] and _multiplies_bytes()


def trellis_byte_linear(
    x: Tensor,
    factor: Tensor,
    stream: Tensor,
    scale: Tensor,
    code: TrellisCode,
    *,
    planes: int,
    backend: Backend = "auto",
) -> Tensor:
    """Multiply `mix(x, factor)` by the weight transposed, both rounded, in the dtype of x.

    Args:
        x: activations [tokens, columns].
        factor: of the columns, float32.
        stream: the weight's, as for `trellis_decode`.
        scale: float32 [rows], of the integers.
        code: the weight's.
        planes: 1 for activations of 8 bits, 2 for 16; the weight has 8.
        backend: which kernels to use, of "cpu" and "reference".
    """
    kernels = kernels_for("trellis.bytes", backend, x.device, among=("cpu", "reference"))
    return kernels.matmul(mix(x, factor), stream, scale, code, planes, x.dtype)
