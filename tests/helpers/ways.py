"""The product of few tokens by each way of multiplying bytes, each in a process of its own that leaves out some of the
processor's features: `python -m tests.helpers.ways WAY`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_LESS = {
    "vnni512": (), "vnni256": ("avx512vbmi",), "avx2": ("avx512", "avxvnni"), "any": ("avx", "fma", "f16c", "xop", "vaes", "vpclmul"),
    "neon": ("avx", "fma", "f16c", "xop", "vaes", "vpclmul"),
}  # fmt: skip
SHAPES = ((3, 18, 33, 264), (4, 16, 17, 515), (7, 16, 9, 77))


def outcome(way: str) -> str:
    """Return the way that a process took, and its largest error; "" where this processor cannot take it."""
    import llvmlite.binding as llvm

    name, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features()
    needed = {"vnni512": ("avx512vbmi", "avx512vnni"), "vnni256": ("avx512vnni", "avx512vl"), "avx2": ("avx2",)}
    if not all(features.get(feature) for feature in needed.get(way, ())):
        return ""
    kept = {key: value and not key.startswith(_LESS[way]) for key, value in features.items()}
    environment = os.environ | {
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": ",".join(f"{'+' if value else '-'}{key}" for key, value in kept.items()),
    }
    command = [sys.executable, "-m", "tests.helpers.ways", way]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _main(asked: str) -> None:
    import torch

    from seedpack.kernels.common import byte_dots

    if asked == "neon":
        setattr(byte_dots, "target_has", lambda feature: feature == "dotprod")  # noqa: B010
    from tests.helpers.products import error, few_tokens

    worst = 0.0
    for code_bits, state_bits, rows, columns in SHAPES:
        torch.manual_seed(0)
        for tail_biting in (True, False):
            weight = few_tokens(code_bits, state_bits, rows, columns, tail_biting)
            for tokens in (1, 3):
                x = torch.randn(tokens, columns)
                found = weight.product(x)
                assert found is not None
                worst = max(worst, error(found, weight.expected(x, 8)))
    print(byte_dots.way(), f"{worst:.0e}")


if __name__ == "__main__":
    _main(sys.argv[1])
