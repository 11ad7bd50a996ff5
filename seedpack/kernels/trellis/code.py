"""The code of a trellis weight, which travels whole from the codec to the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from seedpack.prng import Words, trellis_multiplier, trellis_values


@dataclass(frozen=True)
class TrellisCode:
    """Weight t of a row is the integer of its window, bits [k·t, k·t + L) of the row's little-endian bit stream.

    Attributes:
        code_bits: k.
        state_bits: L.
        key: c, from `prng.trellis_key`.
        tail_biting: whether a stream runs on at its own beginning, or at zeros.
    """

    code_bits: int
    state_bits: int
    key: int
    tail_biting: bool = True

    @cached_property
    def multiplier(self) -> int:
        """a."""
        return trellis_multiplier(self.code_bits, self.state_bits)

    @property
    def memory_bits(self) -> int:
        """Bits of a window that the next one takes over: L - k."""
        return self.state_bits - self.code_bits

    @property
    def memory_mask(self) -> int:
        """Mask of these bits."""
        return (1 << self.memory_bits) - 1

    @property
    def memory_symbols(self) -> int:
        """Symbols that these bits reach into: ceil((L - k) / k)."""
        return -(-self.memory_bits // self.code_bits)

    def values(self, windows: Words) -> Words:
        """Return the integer of each window, see `prng.trellis_values`."""
        return trellis_values(windows, self.multiplier, self.key)

    def tag_bits(self, survivors: int) -> int:
        """Count the low bits of a metric that carry the bits next above a state's own, in a search that keeps
        2^survivors paths: max(k, L - k - survivors), at most 8."""
        return max(self.code_bits, self.memory_bits - survivors)
