"""Abilities that a codec may have beside the contract of `Codec`: a class inherits them too, and callers ask `isinstance`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

from torch import Tensor

from seedpack.codecs.base import Parts

Own = TypeVar("Own")  # typing.Self, which runtime checkers refuse outside of a class


class Rates(ABC):
    """A codec of several rates, so that a budget of bits can be spread over tensors."""

    @abstractmethod
    def variants(self: Own) -> list[Own]:
        """Return this codec at every rate it has, by bits."""

    @property
    @abstractmethod
    def rate(self) -> int | float:
        """The code's bits per weight, by which variants are chosen."""

    @abstractmethod
    def expected_error(self) -> float:
        """Return the relative error ‖W - Ŵ‖² / ‖W‖² measured on N(0, 1)."""

    def quick(self: Own) -> Own:
        """Return a codec of this rate that is fitted sooner, with errors a little larger, to measure what errors cost."""
        return self


class HessianFitting:
    """A codec whose `encode` uses all of a Hessian; others are given its diagonal."""

    def with_hessian(self: Own) -> Own:
        """Return this codec with the settings that it needs for a Hessian; it stores as much."""
        return self


class RowScaling(ABC):
    """A codec whose rows can be scaled once they are packed, at no bit more."""

    @abstractmethod
    def rescaled(self, parts: Parts, factors: Tensor) -> Parts:
        """Return the parts of the weight with its rows times factors [out]."""
