"""Shared fixtures. Tests never touch the network or the user's cache."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for work leave the core to other workers

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from seedpack.converter import usual
from seedpack.loader.layers import PackedModule
from seedpack.loader.parameters import PackedParameters
from tests.helpers.nets import OddNet

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: Triton's kernels then run on the CPU

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _exact() -> None:
    """Packed layers multiply floats, so that results can be compared closely; a test marked `rounds` takes the default."""
    for kind in (PackedModule, PackedParameters):
        kind.int8_activations = False


@pytest.fixture(scope="session", autouse=True)
def _no_usual_calibration() -> None:
    """Calibrate nothing unasked: that takes seconds for the smallest model. Its own tests turn it on."""
    usual.ENABLED = False


@pytest.fixture(autouse=True)
def _rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "rounds" in request.keywords:
        for kind in (PackedModule, PackedParameters):
            monkeypatch.setattr(kind, "int8_activations", None)


@pytest.fixture
def data() -> Callable[[str], Path]:
    """Path of real test material; skips with the reason where it is not at hand."""

    def find(name: str) -> Path:
        if not (DATA / name).exists():
            pytest.skip(f"test material {name} is not at {DATA}")
        return DATA / name

    return find


@pytest.fixture
def net() -> OddNet:
    return OddNet().eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(36).reshape(3, 12) % 50


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` gives NaN and extreme integers, so that an output lane that nobody writes fails loudly."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        result: torch.Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        if result.device.type == "meta":
            return result
        if result.is_floating_point():
            return result.fill_(float("nan"))
        return result.fill_(torch.iinfo(result.dtype).max) if result.dtype != torch.bool else result

    monkeypatch.setattr(torch, "empty", poisoned)
