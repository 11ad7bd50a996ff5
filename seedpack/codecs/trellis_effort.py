"""Efforts of the trellis's encoder, and what was measured with them on N(0, 1) (docs/benchmarks/trellis.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from seedpack.errors import CodecError
from seedpack.prng import TRELLIS_SUMS


@dataclass(frozen=True)
class Effort:
    """The work that an encoder does.

    Attributes:
        log2_edges: binary logarithm of the edges searched per window, of one and of two weights.
        rounds: searches, each with the scale refitted to the one before.
        state_bits: L for one and for two weights per window, unless it is given.
        pairs: the most bits per weight with two weights per window, unless it is given.
    """

    log2_edges: tuple[int, int]
    rounds: int
    state_bits: tuple[int, int]
    pairs: int


EFFORTS = {
    "fast": Effort((11, 14), 1, (16, 16), 3),
    "default": Effort((15, 16), 1, (16, 16), 3),
    "best": Effort((18, 21), 2, (18, 20), 2),
}

# Bits per weight, k, by weights per window: what a window moves on by is whole.
RATES: dict[int, tuple[float, ...]] = {1: (1, 2, 3, 4, 5, 6, 7, 8), 2: (1, 1.5, 2, 2.5, 3, 3.5)}
# The code's standard deviation in units of the weights', least distortion measured on N(0, 1), by weights per window, for
# these k.
STRETCH = {
    "fast": {1: (1.00, 1.06, 1.12, 1.20, 1.25, 1.22, 1.24, 1.26), 2: (1.00, 1.04, 1.08, 1.11, 1.14, 1.18)},
    "default": {1: (1.00, 1.06, 1.10, 1.12, 1.18, 1.24, 1.30, 1.34), 2: (1.02, 1.04, 1.07, 1.10, 1.12, 1.16)},
    "best": {1: (1.02, 1.04, 1.06, 1.10, 1.14, 1.16, 1.19, 1.26), 2: (1.00, 1.03, 1.05, 1.07, 1.08, 1.10)},
}
# The multiplier that is best for an effort where it is not the format's own (M24), by weights per window and k, for L = 16.
USUAL = -1
MULTIPLIERS: dict[str, dict[tuple[int, float], int]] = {
    "fast": {},
    "default": {(1, 3): 0x97C51DE7, (1, 4): 0x658909F3, (1, 5): 0xF281CB1B},
    "best": {},
}
GAP = {  # dB above 4^-k on N(0, 1), default effort, by k
    1: 0.35, 1.5: 0.42, 2: 0.50, 2.5: 0.61, 3: 0.77, 3.5: 0.93, 4: 0.69, 5: 0.89, 6: 1.25, 7: 1.85, 8: 2.85,
}  # fmt: skip

LEAST_MEMORY = 4  # bits of a window that belong to other weights; survivors fill vectors of 16


def code_deviation(weights: int) -> float:
    """Return the standard deviation of a code's integers, sums of bytes, for so many weights per window."""
    squares = sum(factor**2 for factor in TRELLIS_SUMS[weights][0][0])
    return math.sqrt(squares * (256**2 - 1) / 12)


def least_state_bits(symbol_bits: int) -> int:
    """Return the least L for K bits per window: a step's symbol, and as much memory, fits a state."""
    return symbol_bits + max(symbol_bits, LEAST_MEMORY)


def rate(codec: str, value: object) -> int | float:
    """Return k, whole as an int; refuse what no window moves on by.

    Raises:
        CodecError: it is no k.
    """
    rates = {k: k for k in RATES[1] + RATES[2]}
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in rates:
        raise CodecError(f"{codec}: code_bits must be a whole number from 1 to 8, or 1.5, 2.5 or 3.5, got {value!r}")
    return rates[value]


def usual_weights(effort: str, code_bits: int | float, state_bits: int = 0) -> int:
    """Return V for an effort, k, and L or (0) any L, where it is not given."""
    if code_bits not in RATES[1]:
        return 2
    fits = type(state_bits) is not int or not 0 < state_bits < least_state_bits(int(2 * code_bits))
    return 2 if code_bits <= EFFORTS[effort].pairs and fits else 1


def usual_multiplier(effort: str, weights: int, code_bits: int | float, state_bits: int) -> int:
    """Return the multiplier for an effort, V, k and L where it is not given; 0 is the format's own."""
    return MULTIPLIERS[effort].get((weights, code_bits), 0) if state_bits == 16 else 0


def survivors(effort: str, weights: int, symbol_bits: int, memory_bits: int) -> int:
    """Return the binary logarithm m of the paths that the search keeps, from K and L - K."""
    wanted = EFFORTS[effort].log2_edges[weights - 1] - (symbol_bits if weights == 1 else max(symbol_bits, LEAST_MEMORY))
    return min(memory_bits, max(symbol_bits, LEAST_MEMORY, memory_bits - 8, wanted))


def code_unit(effort: str, weights: int, code_bits: int | float) -> float:
    """Return the code's unit for weights of deviation 1: a code of rate k reproduces a variance of 1 - 4^-k."""
    stretch = STRETCH[effort][weights][RATES[weights].index(code_bits)]
    return math.sqrt(1 - 4.0**-code_bits) * stretch / code_deviation(weights)


def distortion(code_bits: int | float) -> float:
    """Return the error of unit variance: the rate–distortion limit 4^-k times the gap to it."""
    return math.pow(10, GAP[code_bits] / 10) * math.pow(4, -code_bits)


def target_spread(factor: Tensor, expected_error: float) -> float:
    """Return how much wider than the weights the targets of the search are, as they compensate for errors.

    Column j of L⁻¹, with C = L·diag(C), takes up the errors that a code of this rate leaves of unit variance.

    Args:
        factor: C of the Hessian's C·Cᵀ, lower triangular [in, in].
        expected_error: of unit variance.
    """
    columns = len(factor)
    inverse = torch.linalg.solve_triangular(
        factor, torch.eye(columns, dtype=factor.dtype, device=factor.device), upper=False
    )
    gain = float((inverse * factor.diagonal()[:, None]).square().sum()) / columns - 1
    return min(math.sqrt(1 + expected_error * gain), 2.0)
