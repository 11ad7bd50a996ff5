"""Products with a trellis weight in its rotated basis, straight from its stream; see `reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seedpack.kernels.common import row_tiles as tiles
from seedpack.kernels.common.gpu_configs import MANY_TOKENS
from seedpack.kernels.dispatch import Backend, choose
from seedpack.kernels.rotation import mix, unable
from seedpack.kernels.rotation.reference import factors, mix_factors
from seedpack.kernels.trellis import matmul_reference as reference
from seedpack.kernels.trellis.decode import trellis_dense

BACKENDS = ("cpu", "triton", "reference")


def trellis_matmul(
    x: Tensor,
    stream: Tensor,
    scale: Tensor,
    *,
    code_bits: int,
    state_bits: int,
    key: int,
    circular: bool = True,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """x [tokens, columns] times the weight [rows, columns] transposed.

    Args:
        x: activations in the rotated basis, float32.
        stream: the weight's, as for `trellis_decode`.
        scale: float32 [rows], of the integers.
        code_bits: k.
        state_bits: L.
        key: c.
        circular: whether rows' streams run on at their own beginning.
        dtype: of the result. Where it has 16 bits, products for many tokens may be made of float16.
        int8: round activations to 8 bits in groups of 256; faster on GPUs.
        backend: which kernels to use.
    """
    chosen = choose("trellis_matmul", backend, x.device, BACKENDS)
    if chosen == "triton":
        from seedpack.kernels.trellis import matmul_triton as triton

        return triton.matmul(x, stream, scale, code_bits, state_bits, key, circular, dtype, int8)
    x = reference.rounded(x) if int8 else x
    if chosen == "reference":
        return reference.matmul(x, stream, scale, code_bits, state_bits, key, circular).to(dtype)
    if x.shape[0] <= tiles.FEW_TOKENS:
        from seedpack.kernels.trellis import matmul_cpu as cpu

        return cpu.matmul(x, stream, scale, code_bits, state_bits, key, circular).to(dtype)
    return tiles.matmul(x, len(scale), _tiles(stream, scale, code_bits, state_bits, key, circular, x.shape[1])).to(
        dtype
    )


def trellis_linear(
    x: Tensor,
    factor: Tensor,
    stream: Tensor,
    scale: Tensor,
    *,
    code_bits: int,
    state_bits: int,
    key: int,
    circular: bool = True,
    int8: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """`mix(x, factor)` times the weight transposed, in the dtype of x: the whole product of a trellis layer.

    On GPUs the mixing of few tokens writes what the product reads, and no launch lies between; hundreds in bfloat16 are
    mixed in bfloat16.
    """
    code: dict[str, Any] = {"code_bits": code_bits, "state_bits": state_bits, "key": key, "circular": circular}
    chosen = choose("trellis_matmul", backend, x.device, BACKENDS)
    if chosen == "triton" and len(x) <= tiles.FEW_TOKENS and unable(x.shape[1])["triton"] is None:
        from seedpack.kernels.trellis import matmul_triton as triton

        return triton.few_tokens(
            triton.mixed(x, factor, code_bits), len(x), stream, scale, **code, dtype=x.dtype, int8=int8
        )
    if chosen == "triton" and x.dtype == torch.bfloat16 and len(x) >= MANY_TOKENS:
        rotated = mix_factors((x * factor).to(x.dtype), factors(x.shape[1]))
    else:
        rotated = mix(x, factor, backend)
    return trellis_matmul(rotated, stream, scale, dtype=x.dtype, int8=int8, backend=backend, **code)


def trellis_matmul_transposed(
    grad: Tensor,
    stream: Tensor,
    scale: Tensor,
    *,
    code_bits: int,
    state_bits: int,
    key: int,
    circular: bool = True,
    columns: int,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Tensor:
    """grad [tokens, rows], float32, times the weight [rows, columns]: the gradient to x, in the rotated basis."""
    chosen = choose("trellis_matmul", backend, grad.device, BACKENDS)
    if chosen == "triton":
        from seedpack.kernels.trellis import matmul_triton as triton

        return triton.matmul_transposed(grad, stream, scale, code_bits, state_bits, key, circular, columns, dtype)
    if chosen == "reference":
        return reference.matmul_transposed(grad, stream, scale, code_bits, state_bits, key, circular, columns).to(dtype)
    tile = _tiles(stream, scale, code_bits, state_bits, key, circular, columns)
    return tiles.matmul_transposed(grad, columns, tile).to(dtype)


def _tiles(
    stream: Tensor, scale: Tensor, code_bits: int, state_bits: int, key: int, circular: bool, columns: int
) -> tiles.Tile:
    return lambda rows: trellis_dense(
        stream[rows],
        scale[rows],
        code_bits=code_bits,
        state_bits=state_bits,
        key=key,
        columns=columns,
        circular=circular,
        backend="cpu",
    )
