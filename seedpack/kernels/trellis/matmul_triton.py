"""The trellis's product in Triton: `gpu_tiles` for many tokens; for few a kernel that expands words in registers.

A lane takes `PER` windows from `WORDS` words of a row's stream, as many as whole words hold. A window costs a shift of two
words, a mask and a multiply–add; each of its weights the bytes' sum (one dp4a on NVIDIA), a conversion by the bits of a float,
and for each token a multiply–add. With activations of 8 bits one dp4a multiplies all weights of a window with a token's.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from seedpack.kernels.common import gpu_configs as configs
from seedpack.kernels.common import gpu_launch as launch
from seedpack.kernels.common.row_tiles import FEW_TOKENS, pad_tokens, padded_token_count
from seedpack.kernels.dispatch import Backend
from seedpack.kernels.rotation import mix, unable
from seedpack.kernels.rotation.reference import factors, mix_factors
from seedpack.kernels.rotation.triton import mix_lanes
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode_triton import byte_dot, byte_factors, byte_offset, regenerated, stream_word
from seedpack.kernels.trellis.matmul_reference import ACTIVATION_GROUP, rounded

TYPICAL_ROWS = 16  # of a program


@triton.jit
def few_tokens_kernel(
    x_ptr, x_scale_ptr, out_ptr, scale_ptr, stream_ptr, words, size, multiplier, key, rows, blocks, per_program,
    CODE_BITS: tl.constexpr, WEIGHTS: tl.constexpr, STATE_BITS: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr,
    ALIGNED: tl.constexpr, TAIL_BITING: tl.constexpr, TOKENS: tl.constexpr, INT8: tl.constexpr, DP4A: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Store out [parts, TOKENS, rows], to be summed over parts, = x · weight.T; a part is `per_program` blocks of the input.

    Windows have WEIGHTS weights and begin CODE_BITS apart. x is [TOKENS, blocks, PER·WEIGHTS, BLOCK_G]: the j-th activations of a
    block's groups lie together. It is float32, or with INT8 the words [TOKENS, blocks, PER, BLOCK_G] of `eight_bits_kernel`,
    with scales.
    """
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = i_row < rows
    i_row = tl.where(m_row, i_row, 0)
    i_token, i_lane = tl.arange(0, TOKENS), tl.arange(0, BLOCK_G)
    b_sum = tl.zeros((BLOCK_N, BLOCK_G, TOKENS), tl.float32)
    b_float = tl.full((BLOCK_N, BLOCK_G), 0x4B000200, tl.int32)  # the bits of 2^23 + 512
    PER_WORD: tl.constexpr = 1 if INT8 else WEIGHTS
    first = tl.program_id(1) * per_program
    for block in range(first, tl.minimum(first + per_program, blocks)):
        i_word = (block * BLOCK_G + i_lane) * WORDS
        p_x = x_ptr + (i_token[None, None, :] * blocks + block) * (PER * PER_WORD * BLOCK_G) + i_lane[None, :, None]
        b_dot = tl.zeros((BLOCK_N, BLOCK_G, TOKENS), tl.int32)
        high = stream_word(stream_ptr, i_row, i_word, words, size, ALIGNED, TAIL_BITING)
        for i in tl.static_range(WORDS):
            low = high
            high = stream_word(stream_ptr, i_row, i_word + (i + 1), words, size, ALIGNED, TAIL_BITING)
            for j in tl.static_range(PER):
                if j * CODE_BITS // 32 == i:
                    window = low >> (j * CODE_BITS % 32)
                    if j * CODE_BITS % 32 + STATE_BITS > 32:
                        window |= high << (32 - j * CODE_BITS % 32)
                    mixed = (window & ((1 << STATE_BITS) - 1)) * tl.cast(multiplier, tl.uint32) + tl.cast(
                        key, tl.uint32
                    )
                    if INT8:
                        b_x = tl.load(p_x + j * BLOCK_G)
                        words_of_all = tl.broadcast_to(mixed[:, :, None], b_dot.shape)
                        b_dot = byte_dot(words_of_all, tl.broadcast_to(b_x, b_dot.shape), b_dot, WEIGHTS, DP4A)
                    else:
                        for weight in tl.static_range(WEIGHTS):
                            b_x = tl.load(p_x + (j * WEIGHTS + weight) * BLOCK_G)
                            factors = tl.full((BLOCK_N, BLOCK_G), 0, tl.int32) + byte_factors(weight, 1, WEIGHTS)
                            bits = byte_dot(mixed, factors, b_float, WEIGHTS, DP4A)  # of the float 2^23 + 512 + sum
                            value = bits.to(tl.float32, bitcast=True) - (8389120.0 + byte_offset(weight, WEIGHTS))
                            b_sum += value[:, :, None] * b_x
        if INT8:
            b_sum += b_dot.to(tl.float32) * tl.load(x_scale_ptr + i_token * blocks + block)[None, None, :]
    b_out = tl.sum(b_sum, 1)
    if INT8 and tl.program_id(1) == 0:  # the bytes' sums are too high
        b_out -= tl.load(x_scale_ptr + TOKENS * blocks + i_token)[None, :]
    b_out *= tl.load(scale_ptr + i_row)[:, None]
    p_out = out_ptr + (tl.program_id(1) * TOKENS + i_token[None, :]) * tl.cast(rows, tl.int64) + i_row[:, None]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), m_row[:, None])


@triton.jit
def _nearest(x, step):
    """Return whole multiples of a step, as floats: adding 3·2^22 rounds to the nearest, ties to even."""
    return (tl.div_rn(x, step) + 12582912.0) - 12582912.0


@triton.jit
def eight_bits_kernel(
    x_ptr, codes_ptr, scale_ptr, blocks, tokens, WEIGHTS: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr
):
    """Round each of `blocks` groups of a program's token to 8 bits: store codes, scales, and behind these, for
    `few_tokens_kernel`, by how much the sums of bytes are too high.

    A group has WORDS words, for WEIGHTS rows of LANES activations in turn. A word has one code in all bytes, or of two codes a
    and b: a, a + b, a - b, b.
    """
    token = tl.program_id(0)
    excess = 0.0
    i_word = tl.arange(0, WORDS)
    for block in range(blocks):
        at = token * blocks + block
        p_x = x_ptr + at * (WORDS * WEIGHTS) + (i_word // LANES) * (WEIGHTS * LANES) + i_word % LANES
        b_x = tl.load(p_x)
        if WEIGHTS == 1:
            step = tl.div_rn(tl.maximum(tl.max(tl.abs(b_x), 0), 1e-30), 127.0)
            b_code = _nearest(b_x, step)
            excess += 510 * tl.sum(b_code, 0) * step
            word = (b_code.to(tl.int32) & 255) * 0x01010101
        else:
            b_y = tl.load(p_x + LANES)
            step = tl.div_rn(tl.maximum(tl.max(tl.abs(b_x) + tl.abs(b_y), 0), 1e-30), 126.0)
            b_x, b_y = _nearest(b_x, step), _nearest(b_y, step)
            excess += tl.sum(382 * b_x + 127 * b_y, 0) * step
            a, b = b_x.to(tl.int32), b_y.to(tl.int32)
            word = (a & 255) | (((a + b) & 255) << 8) | (((a - b) & 255) << 16) | ((b & 255) << 24)
        tl.store(codes_ptr + at * WORDS + i_word, word)
        tl.store(scale_ptr + at, step)
    tl.store(scale_ptr + tokens * blocks + token, excess)


def eight_bits(lanes: Tensor, weights: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales of activations [tokens, blocks, PER, lanes], for so many weights per window, see
    `eight_bits_kernel`; the definition is `rounded`."""
    tokens, blocks, per, count = lanes.shape
    codes = torch.empty(tokens, blocks, per // weights, count, dtype=torch.int32, device=lanes.device)
    scale = torch.empty(tokens * (blocks + 1), dtype=torch.float32, device=lanes.device)
    form = {"WEIGHTS": weights, "LANES": count, "WORDS": per * count // weights}
    with configs.current(lanes.device):
        eight_bits_kernel[(tokens,)](lanes, codes, scale, blocks, tokens, **form, num_warps=2)
    return codes, scale


def _lane_weights(code: TrellisCode) -> int:
    """Return the weights of a lane: as many as whole words hold."""
    return code.weights * 32 // math.gcd(code.symbol_bits, 32)


def mixed_lanes(x: Tensor, factor: Tensor, code: TrellisCode) -> Tensor:
    """Do as `rotation.mix` for x [tokens, columns], laid out as `few_tokens` takes it."""
    per, (tokens, columns) = _lane_weights(code), x.shape
    shape = (padded_token_count(tokens), triton.cdiv(columns, ACTIVATION_GROUP) * ACTIVATION_GROUP)
    out = (torch.empty if shape == x.shape else torch.zeros)(shape, dtype=torch.float32, device=x.device)
    return mix_lanes(x, factor, out, ACTIVATION_GROUP, per).view(shape[0], -1, per, ACTIVATION_GROUP // per)


def in_lanes(x: Tensor, code: TrellisCode) -> Tensor:
    """Lay out rotated activations [tokens, columns] as `few_tokens` takes them."""
    per = _lane_weights(code)
    padded = pad_tokens(x, -x.shape[1] % ACTIVATION_GROUP)
    return padded.view(len(padded), -1, ACTIVATION_GROUP // per, per).transpose(2, 3).contiguous()


def few_tokens(
    lanes: Tensor,
    count: int,
    stream: Tensor,
    scale: Tensor,
    code: TrellisCode,
    dtype: torch.dtype,
    int8: bool = False,
) -> Tensor:
    """Return the product of `count` tokens, at most 8, in a dtype.

    `lanes` is float32 [tokens, blocks, PER, lanes of 256 / PER]: the j-th activations of a block's lanes lie together.
    """
    stream, rows = stream.contiguous().flatten(1), len(scale)
    tokens, blocks, per, block_g = lanes.shape
    x_scale = lanes[:0]
    if int8:
        lanes, x_scale = eight_bits(lanes, code.weights)
    parts = min(blocks, max(1, configs.ENOUGH_PROGRAMS // triton.cdiv(rows, TYPICAL_ROWS)))
    per_program = triton.cdiv(blocks, parts)
    parts = triton.cdiv(blocks, per_program)
    out = torch.empty(parts, tokens, rows, dtype=dtype if parts == 1 else torch.float32, device=lanes.device)

    def grid(block: configs.Config) -> tuple[int, ...]:
        return triton.cdiv(rows, block["BLOCK_N"]), parts

    size = stream.shape[1]
    args = lanes, x_scale, out, scale, stream, size // 4, size, code.multiplier, code.key, rows, blocks, per_program
    form = {"CODE_BITS": code.symbol_bits, "WEIGHTS": code.weights, "STATE_BITS": code.state_bits}
    form |= {
        "TAIL_BITING": code.tail_biting,
        "PER": per // code.weights,
        "WORDS": per // code.weights * code.symbol_bits // 32,
        "ALIGNED": size % 4 == 0,
        "BLOCK_G": block_g,
    }
    constants = {"TOKENS": tokens, "INT8": int8, "DP4A": configs.is_nvidia(lanes.device)}
    name = configs.trellis_few_tokens(tokens)
    launch.start(few_tokens_kernel, name, lanes.device, grid, *args, **form, **constants)
    return (out[0] if parts == 1 else out.sum(0).to(dtype))[:count]


def matmul(x: Tensor, stream: Tensor, scale: Tensor, code: TrellisCode, dtype: torch.dtype, int8: bool) -> Tensor:
    """Do as `matmul_reference.matmul`, summed in another order, and in float16 on tensor cores for many tokens of a 16-bit
    dtype."""
    if len(x) <= FEW_TOKENS:
        return few_tokens(in_lanes(x, code), len(x), stream, scale, code, dtype, int8)
    return launch.matmul(rounded(x, code.weights) if int8 else x, regenerated(stream, scale, code, x.shape[1]), dtype)


def linear(
    x: Tensor, factor: Tensor, stream: Tensor, scale: Tensor, code: TrellisCode, int8: bool, backend: Backend
) -> Tensor:
    """Do as `matmul_reference.linear`: the mixing of few tokens writes what the product reads, and no launch lies between;
    hundreds in bfloat16 are mixed in bfloat16."""
    if len(x) <= FEW_TOKENS and unable(x.shape[1])["triton"] is None:
        return few_tokens(mixed_lanes(x, factor, code), len(x), stream, scale, code, x.dtype, int8)
    if x.dtype == torch.bfloat16 and len(x) >= configs.MANY_TOKENS:
        rotated = mix_factors((x * factor).to(x.dtype), factors(x.shape[1]))
    else:
        rotated = mix(x, factor, backend)
    return matmul(rotated, stream, scale, code, x.dtype, int8)


def matmul_transposed(
    grad: Tensor, stream: Tensor, scale: Tensor, code: TrellisCode, columns: int, dtype: torch.dtype
) -> Tensor:
    """Do as `matmul_reference.matmul_transposed`, exact as `matmul` is."""
    return launch.matmul_transposed(grad, regenerated(stream, scale, code, columns), dtype)
