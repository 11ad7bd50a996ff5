"""The pseudorandom generators of the format: integer-exact on every device, defined in docs/format.md.

Three generators, each with the known answers of its publication in `tests/test_prng.py`:

- `lfsr_cycle`: the linear feedback shift registers of SeedLM (arXiv 2410.10714, Alg. 1, Table 6).
- `philox`: Philox4x32-10 (Salmon et al., SC 2011), as in Random123 and Triton's `tl.randint4x`.
- `squirrel5`: SquirrelNoise5 (Eiserloh, GDC 2017/2021), the noise of RANDUMB.

Integers of 32 bits are held in int64 tensors: torch has no unsigned arithmetic, and wrapping signed products are
undefined behaviour to compilers. `torch.Generator` and `numpy.random` are no part of the format.
"""

from __future__ import annotations

import functools
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seedpack._shapes import Int
from seedpack.errors import CodecError

MASK32 = 0xFFFFFFFF

# Indices j with coefficient α_j = 1 of the register of K bits: SeedLM, Table 6. All have maximal length 2^K - 1.
LFSR_TAPS: dict[int, tuple[int, ...]] = {
    2: (0, 1), 3: (0, 1), 4: (0, 1), 5: (0, 2), 6: (0, 1), 7: (0, 1), 8: (0, 2, 3, 4), 9: (0, 4),
    10: (0, 3), 11: (0, 2), 12: (0, 1, 2, 8), 13: (0, 1, 2, 5), 14: (0, 1, 2, 12), 15: (0, 1),
    16: (0, 1, 3, 12), 17: (0, 3), 18: (0, 7), 19: (0, 1, 2, 5), 20: (0, 3), 21: (0, 2), 22: (0, 1),
    23: (0, 5), 24: (0, 1, 2, 7),
}  # fmt: skip


def lfsr_step(state: int, bits: int) -> int:
    """Return the successor of a state: shift right, feed the XOR of the tapped bits in at the top (SeedLM, Alg. 1).

    >>> [lfsr_step(4, 3), lfsr_step(2, 3), lfsr_step(5, 3)]
    [2, 5, 6]
    """
    feedback = 0
    for tap in LFSR_TAPS[bits]:
        feedback ^= state >> tap
    return (state >> 1) | ((feedback & 1) << (bits - 1))


@functools.lru_cache(maxsize=8)
def lfsr_cycle(bits: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Return all 2^K - 1 states in the order the register visits them, from state 1 on. int32 [2^K - 1], read-only.

    A state is a window of K consecutive bits of one sequence b with b[n+K] = XOR_j b[n+j]. Squaring that rule
    over GF(2) gives b[n + K·2^m] = XOR_j b[n + j·2^m], by which the sequence is made in growing blocks.

    >>> lfsr_cycle(3).tolist()
    [1, 4, 2, 5, 6, 7, 3]
    """
    if bits not in LFSR_TAPS:
        raise CodecError(f"LFSR of {bits} bits: seed_bits must be {min(LFSR_TAPS)} to {max(LFSR_TAPS)}")
    taps, length = LFSR_TAPS[bits], 2**bits - 1
    sequence = np.zeros(length + bits, np.uint8)
    sequence[0] = 1  # state 1: bit 0 set
    known = bits
    while known < len(sequence):
        stride = 1
        while 2 * stride * bits <= known:
            stride *= 2
        block = min(stride * (bits - max(taps)), len(sequence) - known)
        new = sequence[known : known + block]
        for tap in taps:
            source = known - stride * (bits - tap)
            new ^= sequence[source : source + block]
        known += block
    states = np.zeros(length, np.int32)
    for bit in range(bits):
        states |= sequence[bit : bit + length].astype(np.int32) << bit
    states.flags.writeable = False
    return states


@functools.lru_cache(maxsize=8)
def lfsr_position(bits: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Return where in `lfsr_cycle` each state stands: random access. int32 [2^K]; entry 0 (absorbing) is -1."""
    position = np.full(2**bits, -1, np.int32)
    position[lfsr_cycle(bits)] = np.arange(2**bits - 1, dtype=np.int32)
    position.flags.writeable = False
    return position


def lfsr_matrix(seed: int, bits: int, rows: int, columns: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """Return V(s): the `rows·columns` states that follow the seed, row by row (SeedLM, Fig. 4).

    >>> lfsr_matrix(4, bits=3, rows=4, columns=2).tolist()
    [[2, 5], [6, 7], [3, 1], [4, 2]]
    """
    if not 1 <= seed < 2**bits:
        raise CodecError(f"LFSR seed {seed}: must be 1 to {2**bits - 1} for {bits} bits")
    cycle = lfsr_cycle(bits)
    start = int(lfsr_position(bits)[seed]) + 1
    return cycle[(start + np.arange(rows * columns)) % len(cycle)].reshape(rows, columns)


_PHILOX_ROUND_A, _PHILOX_ROUND_B = 0xD2511F53, 0xCD9E8D57
_PHILOX_KEY_A, _PHILOX_KEY_B = 0x9E3779B9, 0xBB67AE85


Words = TypeVar("Words", Tensor, NDArray[np.int64])


def _mul_hi_lo(constant: int, x: Words) -> tuple[Words, Words]:
    """Return the high and low 32 bits of a 32 by 32 bit product, by halves so that int64 never overflows."""
    low, high = constant * (x & 0xFFFF), constant * (x >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(key: tuple[int, int], counter: Words, rounds: int = 10) -> Words:
    """Return by Philox4x32 four random 32-bit words for each counter of four words; any order, any device.

    Args:
        key: two 32-bit words.
        counter: int64 [..., 4], each word in 0 … 2^32 - 1; a torch tensor or a NumPy array, the result is of its kind.
        rounds: 10, as in Random123 and Triton.
    """
    c0, c1, c2, c3 = (counter[..., i : i + 1] for i in range(4))
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = _mul_hi_lo(_PHILOX_ROUND_A, c0)
        hi1, lo1 = _mul_hi_lo(_PHILOX_ROUND_B, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_KEY_A) & MASK32, (k1 + _PHILOX_KEY_B) & MASK32
    words = (c0, c1, c2, c3)
    return torch.cat(words, -1) if isinstance(counter, Tensor) else np.concatenate(words, -1)


def philox_words(seed: int, count: int, offset: int = 0, device: torch.device | None = None) -> Int[Tensor, " count"]:
    """Return `count` words of the stream of a 64-bit seed, from word `offset` on (a multiple of 4).

    Block i of the stream is `philox((seed mod 2^32, seed / 2^32), (i mod 2^32, i / 2^32, 0, 0))`.
    """
    if offset % 4:
        raise CodecError(f"philox_words: offset {offset} must be a multiple of 4")
    block = torch.arange(offset // 4, offset // 4 + -(-count // 4), dtype=torch.int64, device=device)
    zero = torch.zeros_like(block)
    counter = torch.stack((block & MASK32, block >> 32, zero, zero), -1)
    return philox((seed & MASK32, seed >> 32 & MASK32), counter).flatten()[:count]


def rademacher(seed: int, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Return a matrix of ±1, float32 [rows, columns], row-major from the low bits of `philox_words`; exact on every device."""
    return signs(philox_words(seed, -(-rows * columns // 32), device=device), rows * columns).reshape(rows, columns)


def signs(words: Tensor, count: int) -> Tensor:
    """Return the first `count` bits of words of 32 bits, each word's lowest first, as ±1: float32 [count]; a bit that is set is -1."""
    shifts = torch.arange(32, dtype=torch.int64, device=words.device)
    bits = (words[:, None] >> shifts & 1).flatten()[:count]
    return (1 - 2 * bits).to(torch.float32)


def squirrel5(position: Words, seed: int) -> Words:
    """Return by SquirrelNoise5 one 32-bit word for each position (0 … 2^32 - 1, int64; a torch tensor or a NumPy array).

    Weak as a family: position and seed meet in one addition, so another seed is only a shift of the same stream,
    `squirrel5(p, s) = squirrel5(p + s·a⁻¹ mod 2^32, 0)`; streams of two tensors can overlap. Kept for RANDUMB's
    sake; use `philox` for anything new.
    """
    x = _mul_hi_lo(0xD2A80A3F, position & MASK32)[1]
    x = (x + (seed & MASK32)) & MASK32
    x = x ^ (x >> 9)
    x = (x + 0xA884F197) & MASK32
    x = x ^ (x >> 11)
    x = _mul_hi_lo(0x6C736F4B, x)[1]
    x = x ^ (x >> 13)
    x = (x + 0xB79F3ABB) & MASK32
    x = x ^ (x >> 15)
    x = _mul_hi_lo(0x1B56C4F5, x)[1]
    return x ^ (x >> 17)


# Multipliers of the trellis's code by weights per window and bits per weight, for windows of up to 16 bits and for longer
# ones: found by search, docs/codecs/trellis.md tells how.
TRELLIS_MULTIPLIERS: dict[tuple[int, float], tuple[int, int]] = {
    (1, 1): (0x6565AC69, 0x6565AC69),
    (1, 2): (0x214F47D1, 0x7821BD73),
    (1, 3): (0x65605D9D, 0x136D564B),
    (1, 4): (0x5168A857, 0xD216B473),
    (1, 5): (0x06D54E13, 0x0F6338E9),
    (1, 6): (0xCBC21A49, 0xEA2A86E9),
    (1, 7): (0x456737C5, 0x74102017),
    (1, 8): (0x91E125C5, 0xCBF07ED5),
    (2, 1): (0x43638ABF, 0x89C52391),
    (2, 2): (0xAC766A41, 0xAC766A41),
    (2, 3): (0x15BD0C7F, 0x80E44367),
    (2, 1.5): (0xE378C31F, 0x38755CEF),
    (2, 2.5): (0xB98AF4FD, 0xBF90B65F),
    (2, 3.5): (0x3F4133DB, 0x7E957F3F),
}
# The factors of the four bytes of a word, low byte first, and what is taken from their sum, for each weight of a window.
TRELLIS_SUMS: dict[int, tuple[tuple[tuple[int, int, int, int], int], ...]] = {
    1: (((1, 1, 1, 1), 510),),
    2: (((1, 1, 1, 0), 382), ((0, 1, -1, 1), 127)),
}


def trellis_multiplier(code_bits: int | float, state_bits: int, weights: int = 1) -> int:
    """Return the multiplier a of the trellis's code, for so many weights per window."""
    return TRELLIS_MULTIPLIERS[weights, code_bits][state_bits > 16]


@functools.lru_cache(maxsize=256)
def trellis_key(seed: int) -> int:
    """Return the 32-bit constant c of the trellis's code: word 0 of the Philox stream of a seed."""
    with torch.device("cpu"):  # also where a model is being made on the meta device
        return int(philox_words(seed, 1))


def trellis_values(window: Tensor, multiplier: int, key: int, weights: int = 1) -> Tensor:
    """Return the values of each window, int64 [..., weights], from the bytes b0 … b3 of h = a·window + c mod 2^32.

    One weight is b0 + b1 + b2 + b3 - 510: nearly normal, of mean 0 and standard deviation 147.8, and never beyond ±510. Two are
    b0 + b1 + b2 - 382 and b1 - b2 + b3 - 127: of standard deviation 128, in ±383, and not correlated.

    Args:
        window: int64, below 2^20.
        multiplier: a, from `trellis_multiplier`.
        key: c, from `trellis_key`.
        weights: per window, 1 or 2.
    """
    h = (window * multiplier + key) & MASK32
    octets = torch.stack([h >> 8 * i & 255 for i in range(4)], -1)
    values = [
        (octets * torch.tensor(factors, device=h.device)).sum(-1) - offset for factors, offset in TRELLIS_SUMS[weights]
    ]
    return torch.stack(values, -1)
