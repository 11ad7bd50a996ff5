"""Basis weights in Triton: a tile's noise is generated and multiplied in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seedpack.kernels.basis.decode_reference import SQUIRREL_STRIDE
from seedpack.kernels.basis.dense_noise import DenseNoise
from seedpack.kernels.basis.noise_basis import rows_per_block
from seedpack.kernels.common import gpu_launch as launch
from seedpack.kernels.common.gpu_launch import Regenerated


@triton.jit
def squirrel5(position, seed):
    """Return a uint32 of `prng.squirrel5` for each position."""
    x = position * 0xD2A80A3F + seed
    x ^= x >> 9
    x += 0xA884F197
    x ^= x >> 11
    x *= 0x6C736F4B
    x ^= x >> 13
    x += 0xB79F3ABB
    x ^= x >> 15
    x *= 0x1B56C4F5
    return x ^ (x >> 17)


@triton.jit
def number(word):
    """Return a uint32 as a signed integer, times 2^-31."""
    return word.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10


@triton.jit
def four_numbers(i_weight, group, key, PHILOX: tl.constexpr, STRIDE: tl.constexpr):
    """Return the noise of weights (int64) and bases 4·group … 4·group + 3; key is the seed as int64."""
    if PHILOX:
        low, high = i_weight.to(tl.uint32), (i_weight >> 32).to(tl.uint32)
        zero = tl.zeros_like(low)
        w0, w1, w2, w3 = tl.philox(key, low, high, zero + group.to(tl.uint32), zero)
        return number(w0), number(w1), number(w2), number(w3)
    seed = tl.cast(key, tl.uint32)
    first = i_weight.to(tl.uint32) + (group * 4).to(tl.uint32) * STRIDE
    n0, n1 = number(squirrel5(first, seed)), number(squirrel5(first + STRIDE, seed))
    n2, n3 = number(squirrel5(first + 2 * STRIDE, seed)), number(squirrel5(first + 3 * STRIDE, seed))
    return n0, n1, n2, n3


@triton.jit
def basis_tile(parts, i_row, step, SIZES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Make a tile, see `gpu_tiles`; parts = coefficients [blocks, groups of 4], columns, rows per block, key; SIZES = groups, PHILOX, stride."""
    coefs_ptr, columns, per_block, key = parts
    i_column = step * BLOCK_K + tl.arange(0, BLOCK_K)
    i_weight = i_row[:, None] * columns + i_column[None, :]
    p_coefs = coefs_ptr + (i_row // per_block)[:, None] * (4 * SIZES[0])
    b_weight = tl.zeros((i_row.shape[0], BLOCK_K), tl.float32)
    for group in range(SIZES[0]):
        n0, n1, n2, n3 = four_numbers(i_weight, tl.cast(group, tl.int32), key, SIZES[1], SIZES[2])
        p = p_coefs + 4 * group
        b_weight += n0 * tl.load(p) + n1 * tl.load(p + 1) + n2 * tl.load(p + 2) + n3 * tl.load(p + 3)
    return i_column, b_weight


def key_of(basis: DenseNoise) -> int:
    """Return the 64-bit seed as Triton takes it."""
    return basis.seed - (1 << 64) if basis.seed >= 1 << 63 else basis.seed


def regenerated(coefs: Tensor, basis: DenseNoise, rows: int, columns: int) -> Regenerated:
    """Return a weight of noise for the kernels of `gpu_tiles`; the largest coefficient is the scale of all rows."""
    scale = coefs.detach().abs().amax().float().clamp_min(1e-30).reshape(1)
    padded = torch.nn.functional.pad(coefs.detach().float() / scale, (0, -coefs.shape[1] % 4)).contiguous()
    parts = (padded, columns, rows_per_block(rows, len(coefs)), key_of(basis))
    sizes = (padded.shape[1] // 4, basis.philox, SQUIRREL_STRIDE)
    return Regenerated(basis_tile, parts, sizes, scale, rows, columns, heavy=True)


def dense(coefs: Tensor, basis: DenseNoise, rows: int, columns: int, index: Tensor) -> Tensor:
    """Do as `decode_reference.dense` for all rows: the same words, summed in another order."""
    return launch.dense(regenerated(coefs, basis, rows, columns), torch.float32)
