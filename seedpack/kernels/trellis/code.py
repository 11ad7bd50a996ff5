"""The code of a trellis weight, which travels whole from the codec to the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from seedpack.kernels.common.bits import packed_shape
from seedpack.prng import TRELLIS_SUMS, trellis_multiplier, trellis_values


@dataclass(frozen=True)
class TrellisCode:
    """Weights V·s … V·s + V - 1 of a row are integers of window s: bits [V·k·s, V·k·s + L) of its little-endian bit stream.

    Attributes:
        code_bits: k, bits per weight; V·k is whole.
        state_bits: L, bits of a window.
        key: c, from `prng.trellis_key`.
        tail_biting: whether a stream runs on at its own beginning, or at zeros.
        weights: V, weights per window, 1 or 2.
        factor: a, odd, of 32 bits; 0: the format's own for k, L and V.
    """

    code_bits: int | float
    state_bits: int
    key: int
    tail_biting: bool = True
    weights: int = 1
    factor: int = 0

    @cached_property
    def multiplier(self) -> int:
        """a."""
        return self.factor or trellis_multiplier(self.code_bits, self.state_bits, self.weights)

    @property
    def sums(self) -> tuple[tuple[tuple[int, int, int, int], int], ...]:
        """For each weight of a window: the factors of the four bytes of a·window + c, and what is taken from their sum."""
        return TRELLIS_SUMS[self.weights]

    @property
    def symbol_bits(self) -> int:
        """Bits that the stream moves on by from window to window: K = V·k."""
        return int(self.weights * self.code_bits)

    @property
    def memory_bits(self) -> int:
        """Bits of a window that the next one takes over: L - K."""
        return self.state_bits - self.symbol_bits

    @property
    def memory_mask(self) -> int:
        """Mask of these bits."""
        return (1 << self.memory_bits) - 1

    @property
    def memory_symbols(self) -> int:
        """Symbols that these bits reach into: ceil((L - K) / K)."""
        return -(-self.memory_bits // self.symbol_bits)

    def padded(self, columns: int) -> int:
        """Return the weights of a row's stream: whole bytes, and no window longer than the stream."""
        unit = 8 if self.code_bits == int(self.code_bits) else 16
        return unit * -(-max(columns, math.ceil(self.state_bits / self.code_bits)) // unit)

    def stream_shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Return the shape of the streams, uint8 [rows, groups, bytes], packed as in `common.bits`."""
        return packed_shape(rows, self.padded(columns) // self.weights, self.symbol_bits)

    def values(self, windows: Tensor) -> Tensor:
        """Return the integers of each window, int64 [..., V], see `prng.trellis_values`."""
        return trellis_values(windows, self.multiplier, self.key, self.weights)

    def tag_bits(self, survivors: int) -> int:
        """Count the low bits of a metric that carry the bits next above a state's own, in a search that keeps
        2^survivors paths: max(K, L - K - survivors), at most 8."""
        return max(self.symbol_bits, self.memory_bits - survivors)
