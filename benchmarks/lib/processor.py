"""Compiled code as it is on processors with fewer features than this one's: in processes that are told to leave some out."""

from __future__ import annotations

import os

VECTORS = ("avx", "fma", "f16c", "xop", "vaes", "vpclmul")
# By the way of multiplying bytes (`kernels.common.byte_dots`): features that it needs, and those that processors with it lack.
WAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vnni512": (("avx512vbmi", "avx512vnni"), ()),
    "vnni256": (("avx512vnni", "avx512vl"), ("avx512vbmi",)),
    "avx2": (("avx2",), ("avx512", "avxvnni")),
    "neon": ((), VECTORS),  # with its instruction emulated, in tests
    "any": ((), VECTORS),
}


def environment(way: str) -> dict[str, str] | None:
    """Return the environment of a process that takes a way, or None where this processor cannot."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    needed, missing = WAYS[way]
    if not all(features.get(feature) for feature in needed):
        return None
    signs = (f"{'+' if on and not key.startswith(missing) else '-'}{key}" for key, on in features.items())
    return os.environ | {"NUMBA_CPU_NAME": llvm.get_host_cpu_name(), "NUMBA_CPU_FEATURES": ",".join(signs)}
