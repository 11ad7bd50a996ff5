"""The trellis's weights in Triton: a tile of integers from the words of its rows' streams."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seedpack.kernels.common import gpu_launch as launch
from seedpack.kernels.common.gpu_launch import Regenerated
from seedpack.kernels.trellis.code import TrellisCode


@triton.jit
def byte_sum(word):
    """Sum the four bytes of a uint32, as int32."""
    pairs = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    return ((pairs * 0x00010001) >> 16).to(tl.int32)


@triton.jit
def byte_dot(word, activation, start, WEIGHTS: tl.constexpr, DP4A: tl.constexpr):
    """Add to start the four bytes of a uint32, each times a signed byte of an int32; of one weight all of these are the same."""
    if DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [word, activation, start], dtype=tl.int32, is_pure=True, pack=1
        )
    if WEIGHTS == 1:
        return start + byte_sum(word) * ((activation << 24) >> 24)
    for byte in tl.static_range(4):
        start += ((word >> (8 * byte)) & 255).to(tl.int32) * ((activation << (24 - 8 * byte)) >> 24)
    return start


@triton.jit
def byte_factors(weight, unit, WEIGHTS: tl.constexpr):
    """Return the factors of a word's bytes for one of its weights, see `prng.TRELLIS_SUMS`, times a unit up to 127, each in a byte
    of an int32."""
    both = tl.where(weight == 0, unit * 0x00010101, unit * 0x01000100 | (-unit & 255) << 16)
    return unit * 0x01010101 if WEIGHTS == 1 else both


@triton.jit
def byte_offset(weight, WEIGHTS: tl.constexpr):
    """Return what is taken from the sum."""
    return 510 if WEIGHTS == 1 else tl.where(weight == 0, 382, 127)


@triton.jit
def stream_word(stream_ptr, i_row, i_word, words, size, ALIGNED: tl.constexpr, TAIL_BITING: tl.constexpr):
    """Load word i_word [n] of each row [m] of a stream of `size` bytes, uint32 [m, n].

    A word beyond the end of a tail-biting row is one of its beginning, beyond that, any; of another row, zero. Rows that are
    not a whole number of words are read byte by byte.
    """
    if ALIGNED:
        p_row = stream_ptr.to(tl.pointer_type(tl.uint32)) + i_row[:, None] * words
        if TAIL_BITING:
            i_word = tl.minimum(tl.where(i_word < words, i_word, i_word - words), words - 1)
            word = tl.load(p_row + i_word[None, :])
        else:
            word = tl.load(p_row + i_word[None, :], (i_word < words)[None, :], other=0)
    else:
        p_row = stream_ptr + i_row[:, None] * size
        word = tl.zeros((i_row.shape[0], i_word.shape[0]), tl.uint32)
        for byte in tl.static_range(4):
            i_byte = i_word * 4 + byte
            octet = tl.load(p_row + (i_byte % size)[None, :], (TAIL_BITING | (i_byte < size))[None, :], other=0)
            word |= octet.to(tl.uint32) << (8 * byte)
    return word


@triton.jit
def trellis_tile(parts, i_row, step, SIZES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Make a tile, see `gpu_tiles`; parts = stream, words and bytes per row, a, c; SIZES = K, L, whether rows are whole words,
    whether they are tail-biting, and V."""
    stream_ptr, words, size, multiplier, key = parts
    SYMBOL_BITS: tl.constexpr = SIZES[0]
    STATE_BITS: tl.constexpr = SIZES[1]
    WEIGHTS: tl.constexpr = SIZES[4]
    i_column = step * BLOCK_K + tl.arange(0, BLOCK_K)
    bit = i_column // WEIGHTS * SYMBOL_BITS
    low = stream_word(stream_ptr, i_row, bit >> 5, words, size, SIZES[2], SIZES[3])
    high = stream_word(stream_ptr, i_row, (bit >> 5) + 1, words, size, SIZES[2], SIZES[3])
    shift = (bit & 31).to(tl.uint32)[None, :]
    window = ((low >> shift) | ((high << 1) << (31 - shift))) & ((1 << STATE_BITS) - 1)
    mixed = window * tl.cast(multiplier, tl.uint32) + tl.cast(key, tl.uint32)
    i_weight = (i_column % WEIGHTS)[None, :]
    start = tl.zeros(mixed.shape, tl.int32) - byte_offset(i_weight, WEIGHTS)
    factors = tl.zeros(mixed.shape, tl.int32) + byte_factors(i_weight, 1, WEIGHTS)
    return i_column, byte_dot(mixed, factors, start, WEIGHTS, False).to(tl.float32)


def regenerated(stream: Tensor, scale: Tensor, code: TrellisCode, columns: int) -> Regenerated:
    """Return a trellis weight for the kernels of `gpu_tiles`."""
    stream = stream.contiguous().flatten(1)
    size = stream.shape[1]
    parts = (stream, size // 4, size, code.multiplier, code.key)
    sizes = (code.symbol_bits, code.state_bits, size % 4 == 0, code.tail_biting, code.weights)
    return Regenerated(trellis_tile, parts, sizes, scale, stream.shape[0], columns)


def dense(stream: Tensor, scale: Tensor, code: TrellisCode, columns: int) -> Tensor:
    """Do as `decode_reference.dense`, bit for bit."""
    return launch.dense(regenerated(stream, scale, code, columns), torch.float32)


def decode(stream: Tensor, code: TrellisCode, columns: int) -> Tensor:
    """Do as `decode_reference.decode`, bit for bit."""
    return launch.dense(
        regenerated(stream, torch.ones(1, dtype=torch.float32, device=stream.device), code, columns), torch.int16
    )
