from __future__ import annotations

import sys

import pytest
import torch

from seedpack.errors import BackendError
from seedpack.kernels import dispatch
from seedpack.kernels.dispatch import Kernels, kernels_for
from seedpack.kernels.rotation import cpu, reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def chosen(backend: str, device: torch.device) -> Kernels:
    return kernels_for("rotation", backend, device, among=("cpu", "reference"))  # type: ignore[arg-type]


def test_auto_takes_the_first_that_can() -> None:
    assert chosen("auto", CPU) is cpu and chosen("auto", CUDA) is reference


def test_operations_are_named_by_their_place() -> None:
    assert kernels_for("rotation", "auto", CPU) is sys.modules["seedpack.kernels.rotation.cpu"]
    assert kernels_for("trellis.decode", "cpu", CPU) is sys.modules["seedpack.kernels.trellis.decode_cpu"]


def test_explicit_works_or_raises() -> None:
    assert chosen("reference", CPU) is reference
    for backend, device, message in [
        ("triton", CPU, "rotation has no backend 'triton'; it has: cpu, reference"),
        ("cpu", CUDA, "cannot run: it runs on the CPU, the tensors are on cuda"),
        ("fast", CPU, "unknown backend 'fast'; known: auto, reference, cpu, triton"),
    ]:
        with pytest.raises(BackendError, match=message):
            chosen(backend, device)


def test_auto_says_once_what_it_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_numba", lambda: False)
    dispatch._warn_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match="backend 'cpu' passed over, Numba is not installed"):
        assert chosen("auto", CPU) is reference
    assert chosen("auto", CPU) is reference
    with pytest.raises(BackendError, match="Numba is not installed"):
        chosen("cpu", CPU)


def test_everything_runs_without_numba() -> None:
    """As on machines that have a GPU and no Numba: the reference encodes and decodes."""
    import subprocess
    import sys

    code = """
import sys, warnings
sys.modules["numba"] = None
warnings.simplefilter("ignore", RuntimeWarning)
import torch, seedpack
from seedpack.codecs.seedlm import SeedLMCodec
net = torch.nn.Linear(16, 4)
seedpack.compress(net, sys.argv[1], codec=SeedLMCodec(8, 8, 3))
packed = seedpack.load(sys.argv[1], model=torch.nn.Linear(16, 4))
print(packed(torch.zeros(1, 16)).shape)
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, f"{folder}/x.safetensors"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([1, 4])", done.stderr
