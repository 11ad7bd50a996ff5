"""The product of few tokens and the trellis's search by each way of multiplying bytes, each in a process of its own that leaves out some of the
processor's features: `python -m tests.helpers.ways WAY`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.lib.processor import environment

ROOT = Path(__file__).resolve().parent.parent.parent
SEARCHES = (
    (1, 10, 5, 1),
    (3, 12, 6, 1),
    (4, 17, 7, 1),
    (5, 13, 5, 1),
    (1, 12, 5, 2),
    (2, 14, 6, 2),
    (3, 13, 6, 2),
    (2.5, 13, 5, 2),
)
SHAPES = (
    (3, 18, 33, 264, 1),
    (4, 16, 17, 515, 1),
    (7, 16, 9, 77, 1),
    (3, 16, 33, 264, 2),
    (2, 20, 17, 515, 2),
    (3.5, 16, 17, 515, 2),
)


def outcome(way: str) -> str:
    """Return the way that a process took, its largest error, and how many streams of its search are not the reference's; ""
    where this processor cannot take it."""
    if (changed := environment(way)) is None:
        return ""
    command = [sys.executable, "-m", "tests.helpers.ways", way]
    with tempfile.TemporaryDirectory() as folder:
        if way == "neon":  # its code is kept apart: it is emulated on a processor that takes another way
            changed["NUMBA_CACHE_DIR"] = folder
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
    print(byte_dots.way(), f"{worst:.0e}", sum(map(_search_differs, SEARCHES)))


def _search_differs(form: tuple[float, int, int, int]) -> bool:
    import torch

    from seedpack.kernels.trellis.code import TrellisCode
    from seedpack.kernels.trellis.search import trellis_search
    from seedpack.prng import trellis_key

    code_bits, state_bits, survivors, weights = form
    code, values = TrellisCode(code_bits, state_bits, trellis_key(7), weights=weights), torch.randn(3, 32) * 150
    values[1] *= 10  # beyond the code's reach
    found = [
        trellis_search(values, code, survivors=survivors, columns=21, backend=backend)
        for backend in ("cpu", "reference")
    ]
    return not torch.equal(*found)


if __name__ == "__main__":
    _main(sys.argv[1])
