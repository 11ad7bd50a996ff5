"""Efforts of the trellis's encoder, and what was measured with them on N(0, 1) (docs/benchmarks/trellis.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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

# The code's standard deviation in units of the weights', least distortion measured on N(0, 1), by weights per window, for
# k = 1 … 8.
STRETCH = {
    "fast": {1: (1.00, 1.06, 1.12, 1.20, 1.25, 1.22, 1.24, 1.26), 2: (1.00, 1.08, 1.14)},
    "default": {1: (1.00, 1.06, 1.10, 1.12, 1.18, 1.24, 1.30, 1.34), 2: (1.02, 1.07, 1.12)},
    "best": {1: (1.02, 1.04, 1.06, 1.10, 1.14, 1.16, 1.19, 1.26), 2: (1.00, 1.05, 1.08)},
}
# The multiplier that is best for an effort where it is not the format's own (M24), by weights per window and k, for L = 16.
USUAL = -1
MULTIPLIERS: dict[str, dict[tuple[int, int], int]] = {
    "fast": {},
    "default": {(1, 3): 0x97C51DE7, (1, 4): 0x658909F3, (1, 5): 0xF281CB1B},
    "best": {},
}
GAP = (0.35, 0.50, 0.77, 0.69, 0.89, 1.25, 1.85, 2.85)  # dB above 4^-k on N(0, 1), default effort, k = 1 … 8

LEAST_MEMORY = 4  # bits of a window that belong to other weights; survivors fill vectors of 16
MOST_PAIRED = 3  # bits per weight of which a window can have two


def code_deviation(weights: int) -> float:
    """Return the standard deviation of a code's integers, sums of bytes, for so many weights per window."""
    squares = sum(factor**2 for factor in TRELLIS_SUMS[weights][0][0])
    return math.sqrt(squares * (256**2 - 1) / 12)


def least_state_bits(symbol_bits: int) -> int:
    """Return the least L for K bits per window: a step's symbol, and as much memory, fits a state."""
    return symbol_bits + max(symbol_bits, LEAST_MEMORY)


def usual_weights(effort: str, code_bits: int, state_bits: int = 0) -> int:
    """Return V for an effort, k, and L or (0) any L, where it is not given."""
    fits = type(state_bits) is not int or not 0 < state_bits < least_state_bits(2 * code_bits)
    return 2 if code_bits <= EFFORTS[effort].pairs and fits else 1


def usual_multiplier(effort: str, weights: int, code_bits: int, state_bits: int) -> int:
    """Return the multiplier for an effort, V, k and L where it is not given; 0 is the format's own."""
    return MULTIPLIERS[effort].get((weights, code_bits), 0) if state_bits == 16 else 0


def survivors(effort: str, weights: int, symbol_bits: int, memory_bits: int) -> int:
    """Return the binary logarithm m of the paths that the search keeps, from K and L - K."""
    wanted = EFFORTS[effort].log2_edges[weights - 1] - (symbol_bits if weights == 1 else max(symbol_bits, LEAST_MEMORY))
    return min(memory_bits, max(symbol_bits, LEAST_MEMORY, memory_bits - 8, wanted))


def code_unit(effort: str, weights: int, code_bits: int) -> float:
    """Return the code's unit for weights of deviation 1: a code of rate k reproduces a variance of 1 - 4^-k."""
    stretch = STRETCH[effort][weights][code_bits - 1]
    return math.sqrt(1 - 4.0**-code_bits) * stretch / code_deviation(weights)


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
