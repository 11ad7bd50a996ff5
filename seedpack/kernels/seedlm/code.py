"""The code of a SeedLM weight and its packed parts, which travel whole from the codec to the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

CODE_BITS = 4  # of an exponent, and of a mantissa
UNROLLED = 128  # states of a block up to which the CPU's kernels unroll their shifts
SEQUENCE, CODES = 64, 24  # bits of a block's sequence and of its codes that the GPU's kernels hold in an integer


@dataclass(frozen=True)
class SeedLMCode:
    """Each block of C weights of a row is U(seed)·(mantissas·2^exponent), see `decode_reference.decode`.

    Attributes:
        seed_bits: K, of a seed and of the register's states.
        block: C, weights of a block.
        rank: P, mantissas of a block.
    """

    seed_bits: int
    block: int
    rank: int

    @property
    def half(self) -> int:
        """The centre of the register's states: 2^(K-1)."""
        return 1 << (self.seed_bits - 1)

    @property
    def unit(self) -> float:
        """The factor of a centred state, with which U is in ±1: 1 / (2^(K-1) - 1)."""
        return 1.0 / (self.half - 1)

    @property
    def states(self) -> int:
        """States that follow the seed of a block: C·P."""
        return self.block * self.rank

    @property
    def codes_bits(self) -> int:
        """Bits of a block's exponent and mantissas: 4·(P + 1)."""
        return CODE_BITS * (self.rank + 1)

    def blocks(self, columns: int) -> int:
        """Return the blocks of a row of so many weights."""
        return -(-columns // self.block)

    @cached_property
    def unable(self) -> Mapping[str, str | None]:
        """The backends that do not take these sizes, and why."""
        reason = f"blocks of {self.block}×{self.rank} states of {self.seed_bits} bits are too large for it"
        fits = self.seed_bits + self.states <= SEQUENCE and self.codes_bits <= CODES
        return {"cpu": None if self.states <= UNROLLED else reason, "triton": None if fits else reason}


class SeedLMParts(NamedTuple):
    """The packed parts of a weight [rows, columns].

    `seeds` uint8 [rows, groups, bytes]: a seed of K bits per block; `codes` uint8 [rows, groups, bytes]: the exponent and the
    mantissas of each block, 4 bits each; `exponent_bias` int8 [1], which all exponents have in common.
    """

    seeds: Tensor
    codes: Tensor
    exponent_bias: Tensor

    def rows(self, index: slice) -> SeedLMParts:
        """Return the parts of some rows."""
        return self._replace(seeds=self.seeds[index], codes=self.codes[index])
