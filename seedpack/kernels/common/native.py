"""Functions that are called at their address: from Python without a dispatcher, and from compiled code."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from seedpack.kernels.common.code_cache import compile_at


class Native:
    """A function of so many whole numbers, compiled when it is made and kept on disk.

    Attributes:
        address: of its code.
        call: calls it from Python, without Python's lock.
    """

    def __init__(self, function: Callable[..., int], words: int, variant: str = "native"):
        self._compiled = compile_at(function, words, variant)
        self.address: int = self._compiled.address
        form = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * words)
        self.call: Callable[..., int] = form(self.address)
