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
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: Triton's kernels then run on the CPU

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data() -> Callable[[str], Path]:
    """Path of real test material; skips with the reason where it is not at hand."""

    def find(name: str) -> Path:
        if not (DATA / name).exists():
            pytest.skip(f"test material {name} is not at {DATA}")
        return DATA / name

    return find


class Net(nn.Module):
    """Every kind of layer, some shapes that no block divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.conv1 = nn.Conv1d(24, 20, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 9, 3, stride=2, padding_mode="circular", padding=1)
        self.norm = nn.LayerNorm(20)
        self.fc = nn.Linear(20, 33)
        self.out = nn.Linear(33, 7, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv1(self.embed(ids).mT).mT
        y = self.conv2(x[:, None]).mean((1, 2, 3))
        out: torch.Tensor = self.out(torch.relu(self.fc(self.norm(x)))) + y[:, None, None]
        return out


@pytest.fixture
def net() -> Net:
    return Net().eval()


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
