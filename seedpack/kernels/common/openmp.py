"""Torch's own threads for compiled code: where torch works with OpenMP, products share them, and nobody waits for a core that
another pool's threads hold while they look for work."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

# GNU's, and the two that take its calls.
_NAMES = ("libgomp.so.1", "libiomp5.so", "libomp.so")


@cache
def parallel_region() -> int:
    """Return the address of GNU OpenMP's `GOMP_parallel(function, argument, threads, flags)` in the library that torch has
    loaded, or 0: then Numba shares work out."""
    if sys.platform != "linux" or "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return 0
    for path in (*sorted(Path(torch.__file__).with_name("lib").glob("libgomp*.so*")), *_NAMES):
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
    return 0
