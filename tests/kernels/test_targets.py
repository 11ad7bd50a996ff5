"""Kernels compiled for another processor than this one (NUMBA_CPU_NAME), as clusters of several kinds need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TARGETS: list[dict[str, str]] = [{}, {"NUMBA_CPU_NAME": "generic"}, {"NUMBA_CPU_NAME": "haswell"}]
DECODE = """
import torch
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode import trellis_decode
stream, code = torch.randint(0, 256, (3, 5, 4), dtype=torch.uint8), TrellisCode(4, 16, 12345, True)
decoded = [trellis_decode(stream, code, columns=40, backend=backend) for backend in ("cpu", "reference")]
print(torch.equal(*decoded))
"""
ALL = """
import hashlib, torch
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.trellis import TrellisCodec
torch.manual_seed(0)
weight, digest = torch.randn(20, 72), hashlib.sha256()
for codec in (TrellisCodec(4, effort="fast"), SeedLMCodec(8, 8, 3), BasisCodec(count=5), BasisCodec(count=5, generator="philox")):
    if codec.spec().config.get("generator") == "philox":  # least squares in float32, whose sums are as long as vectors
        parts = {"weight": torch.linspace(-1, 1, 5).view(torch.int32).view(1, 1, 5)}
    else:
        parts = codec.encode(weight)
    for value in (*parts.values(), codec.decode(parts, (20, 72), torch.float32)):
        digest.update(value.numpy().tobytes())
    product = codec.matmul(weight[:2], parts, (20, 72))
    torch.testing.assert_close(product, weight[:2] @ codec.decode(parts, (20, 72), torch.float32).T)
print(digest.hexdigest())
"""


def output(code: str, target: dict[str, str], cache: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_CPU")}
    environment |= {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(cache), **target}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (target, done.returncode, done.stderr)
    return done.stdout.strip()


@pytest.mark.slow
def test_this_machines_features_under_another_name(tmp_path: Path) -> None:
    assert output(DECODE, {"NUMBA_CPU_NAME": "haswell"}, tmp_path) == "True"


@pytest.mark.slow
def test_all_targets_encode_and_decode_the_same(tmp_path: Path) -> None:
    """From one cache, which tells the targets apart."""
    assert len({output(ALL, target, tmp_path) for target in TARGETS}) == 1
