"""The product of few tokens by each way of multiplying bytes, each in a process of its own that leaves out some of the
processor's features: `python -m tests.helpers.ways WAY`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.lib.processor import environment

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = ((3, 18, 33, 264, 1), (4, 16, 17, 515, 1), (7, 16, 9, 77, 1), (3, 16, 33, 264, 2), (2, 20, 17, 515, 2))


def outcome(way: str) -> str:
    """Return the way that a process took, and its largest error; "" where this processor cannot take it."""
    if (changed := environment(way)) is None:
        return ""
    command = [sys.executable, "-m", "tests.helpers.ways", way]
    done = subprocess.run(command, cwd=ROOT, env=changed, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _main(asked: str) -> None:
    import torch

    from seedpack.kernels.common import byte_dots

    if asked == "neon":
        setattr(byte_dots, "target_has", lambda feature: feature == "dotprod")  # noqa: B010
    from tests.helpers.products import error, few_tokens

    worst = 0.0
    for code_bits, state_bits, rows, columns, weights in SHAPES:
        torch.manual_seed(0)
        for tail_biting in (True, False):
            weight = few_tokens(code_bits, state_bits, rows, columns, tail_biting, weights=weights)
            for tokens in (1, 3):
                x = torch.randn(tokens, columns)
                found = weight.product(x)
                assert found is not None
                worst = max(worst, error(found, weight.expected(x, 8)))
    print(byte_dots.way(), f"{worst:.0e}")


if __name__ == "__main__":
    _main(sys.argv[1])
