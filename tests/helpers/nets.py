"""Small networks of many kinds of layers, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import seedpack

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Convolution and batch norm over an image, an embedding and an LSTM over a text, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.embedding = nn.Embedding(20, 12)
        self.lstm = nn.LSTM(12, 10, batch_first=True)
        self.head = nn.Linear(18, 5)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """[n, 1, 8, 8] and [n, 6] -> [n, 5]."""
        seen = self.norm(self.conv(image)).relu().mean((2, 3))
        read, _ = self.lstm(self.embedding(text))
        out: Tensor = self.head(torch.cat((seen, read[:, -1]), 1))
        return out


class OddNet(nn.Module):
    """Every kind of layer, some shapes that no block divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.conv1 = nn.Conv1d(24, 20, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 9, 3, stride=2, padding_mode="circular", padding=1)
        self.norm = nn.LayerNorm(20)
        self.fc = nn.Linear(20, 33)
        self.out = nn.Linear(33, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1(self.embed(ids).mT).mT
        y = self.conv2(x[:, None]).mean((1, 2, 3))
        out: Tensor = self.out(torch.relu(self.fc(self.norm(x)))) + y[:, None, None]
        return out


def batch() -> Batch:
    return torch.randn(4, 1, 8, 8), torch.randint(0, 20, (4, 6))


def trained(model: nn.Module, inputs: Any, targets: Tensor, steps: int = 60, lr: float = 1e-2) -> tuple[float, float]:
    """The loss before and after some steps of plain PyTorch."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(*inputs), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    model.eval()
    return losses[0], losses[-1]


def check_saved(model: nn.Module, fresh: Callable[[], nn.Module], inputs: Any, path: Path) -> nn.Module:
    """What is saved and loaded predicts the same, to the bit; returns it."""
    seedpack.save(model, path)
    loaded: nn.Module = seedpack.load(path, model=fresh()).eval()
    with torch.no_grad():
        assert torch.equal(model(*inputs), loaded(*inputs))
    return loaded
