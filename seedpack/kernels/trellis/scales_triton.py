"""The factors of a trellis weight in Triton, all in one launch: it goes before every product, so that nothing is kept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seedpack.kernels.common import gpu_configs as configs

BLOCK = 512
WARPS = 4


@triton.jit
def scales_kernel(
    scales_ptr, exponent_ptr, balance_ptr, signs_ptr, scale_ptr, factor_ptr, rows, columns,
    BALANCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store scale [rows] = float16·2^exponent / 128 and, with BALANCED, factor [columns] = sign / 2^((q - 8) / 4), bit for bit
    as the reference: powers of two are exact, and a quarter octave is a float32 times one."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_scale = tl.load(scales_ptr + i, i < rows, other=0).to(tl.float16, bitcast=True).to(tl.float32)
    power = (tl.load(exponent_ptr).to(tl.int32) + (127 - 7)) << 23
    tl.store(scale_ptr + i, b_scale * power.to(tl.float32, bitcast=True), i < rows)
    if BALANCED:
        m = i < columns
        q = (tl.load(balance_ptr + i // 2, m, other=0).to(tl.int32) >> (i % 2 * 4)) & 15
        quarter = tl.where(q % 4 == 1, 1.189207115002721, tl.where(q % 4 == 2, 1.4142135623730951, 1.681792830507429))
        quarter = tl.where(q % 4 == 0, 1.0, quarter)
        octave = ((q // 4 + (127 - 2)) << 23).to(tl.float32, bitcast=True)
        tl.store(factor_ptr + i, tl.div_rn(tl.load(signs_ptr + i, m, other=1.0), quarter * octave), m)


def prepare(scales: Tensor, exponent: Tensor, balance: Tensor | None, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Do as `scales_reference.prepare`, bit for bit."""
    rows, columns, device = len(scales), len(signs), scales.device
    scale = torch.empty(rows, dtype=torch.float32, device=device)
    factor = signs if balance is None else torch.empty(columns, dtype=torch.float32, device=device)
    octets = scales if balance is None else balance.contiguous()
    grid = (triton.cdiv(rows if balance is None else max(rows, columns), BLOCK),)
    with configs.current(device):
        scales_kernel[grid](
            scales.contiguous(), exponent, octets, signs, scale, factor, rows, columns,
            BALANCED=balance is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return scale, factor
