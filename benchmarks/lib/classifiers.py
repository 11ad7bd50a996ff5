"""Small classifiers of pictures, and one way to train them all."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.lib.pictures import Pictures


class LeNet(nn.Sequential):
    """LeNet-5 with ReLU and max pooling for pictures of 28 by 28: 44,426 parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )  # fmt: skip


class Block(nn.Module):
    """Two convolutions beside a shortcut that drops every second place and adds channels of zeros."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.more = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        short = x[:, :, :: self.stride, :: self.stride]
        out: Tensor = y + nn.functional.pad(short, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return out.relu()


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10 (He et al., CVPR 2016): 269,722 parameters at width 16."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        sizes = [
            (width * 2 ** max(0, s - (b == 0)), width * 2**s, 2 if s and not b else 1)
            for s in range(3)
            for b in range(3)
        ]
        self.blocks = nn.Sequential(*(Block(*size) for size in sizes))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.bn(self.conv(x)).relu()).mean((2, 3)))
        return y


def prepared(pictures: Pictures) -> Pictures:
    """Float pictures of mean 0 and standard deviation 1 in each channel of the training set."""
    train, test = pictures.train.float(), pictures.test.float()
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return pictures._replace(train=(train - mean) / std, test=(test - mean) / std)


def batches(
    pictures: Pictures, size: int, moved: int, mirrored: bool, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass in random order, each batch moved by up to so many pixels, and half of the pictures mirrored if wanted."""
    for index in torch.randperm(len(pictures.train), generator=generator).split(size):
        x = pictures.train[index]
        if moved:
            down, right = torch.randint(0, 2 * moved + 1, (2,), generator=generator).tolist()
            height, width = x.shape[2:]
            x = nn.functional.pad(x, (moved,) * 4)[:, :, down : down + height, right : right + width]
        if mirrored:
            flip = torch.rand(len(x), generator=generator) < 0.5
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
        yield x, pictures.train_classes[index]


def learning_rate(count: int) -> float:
    """For Adam on the coefficients of a basis, which start at a standard deviation of count^-½."""
    return 0.15 / math.sqrt(count)


def train(
    model: nn.Module, pictures: Pictures, epochs: int, lr: float, *, size: int = 128, augment: bool = False, bfloat16: bool = False,
    label: str = "", after_step: Callable[[], object] = lambda: None,
    after_epoch: Callable[[], object] = lambda: None, extra_loss: Callable[[], Tensor] | None = None,
) -> nn.Module:  # fmt: skip
    """Train in place by Adam, its learning rate falling to zero along a half cosine; returns the model, in evaluation."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    steps = epochs * -(-len(pictures.train) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator, started = torch.Generator().manual_seed(0), time.perf_counter()
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for x, classes in batches(pictures, size, 4 * augment, augment, generator):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                out = model(x)
            loss = nn.functional.cross_entropy(out.float(), classes)
            if extra_loss is not None:
                loss = loss + extra_loss()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            after_step()
            total += loss.item() * len(x)
        spent = time.perf_counter() - started
        left = spent / (epoch + 1) * (epochs - epoch - 1)
        print(
            f"{label}: epoch {epoch + 1}/{epochs}, loss {total / len(pictures.train):.4f}, {spent:.0f} s, {left:.0f} s left",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        after_epoch()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Pictures) -> float:
    """The share of test pictures whose class is found."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == classes).sum())
        for x, classes in zip(pictures.test.split(500), pictures.test_classes.split(500), strict=True)
    )
    return right / len(pictures.test)
