"""Functions that compiled code calls at their address."""

from __future__ import annotations

from collections.abc import Callable

from seedpack.kernels.common.code_cache import compile_at


class Native:
    """A function of one whole number, compiled when it is made and kept on disk.

    Attributes:
        address: of its code.
    """

    def __init__(self, function: Callable[[int], int], variant: str):
        self._compiled = compile_at(function, variant)
        self.address: int = self._compiled.address
