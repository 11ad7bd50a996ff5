"""Supermasks: random networks with a learnt mask, beside training the same networks."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import seedpack
from benchmarks.lib import pictures, report
from benchmarks.lib.classifiers import LeNet, ResNet20, accuracy, prepared, train
from seedpack.reparam import mask_

WIDE = 32  # channels of the first layer; ResNet-20 has 16


class Conv4(nn.Sequential):
    """A small VGG for pictures of 28 by 28, as in the paper's Conv-4: 1.9 million parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128 * 49, 256), nn.ReLU(), nn.Linear(256, 10),
        )  # fmt: skip


def row(
    make: Callable[[], nn.Module], load: Callable[[], pictures.Pictures], epochs: int, kept: float | None, label: str
) -> dict[str, Any]:
    data = prepared(load())
    torch.manual_seed(0)
    model = make() if kept is None else mask_(make(), kept)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    augment, large = data.train.shape[1] == 3, "LeNet" not in label
    train(model, data, epochs, 2e-3 if kept is None else 1e-3, augment=augment, bfloat16=large, label=label)
    found = {
        "accuracy": accuracy(model, data),
        "epochs": epochs,
        "weights": sum(p.numel() for p in make().parameters()),
    }
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as the loaded one: convolutions sum in another order else
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "net.safetensors"
        seedpack.save(model, file)
        loaded = seedpack.load(file, model=make()).eval()
        same = torch.equal(loaded(data.test[:100]), model(data.test[:100]))
        return {**found, "bytes": file.stat().st_size, "same": float(same)}


def measure(result: report.Result) -> None:
    methods: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, make, load, epochs, shares in (
        ("LeNet-5, Fashion-MNIST", LeNet, pictures.fashion_mnist, (10, 10), (None, 0.5, 0.3)),
        ("Conv-4, Fashion-MNIST", Conv4, pictures.fashion_mnist, (5, 10), (None, 0.5)),
        (f"ResNet-20 of width {WIDE}, CIFAR-10", lambda: ResNet20(WIDE), pictures.cifar10, (4, 8), (None, 0.5)),
    ):
        for kept in shares:
            label = f"{name}: {'all weights trained' if kept is None else f'{100 * kept:.0f}% kept'}"
            methods[label] = functools.partial(row, make, load, epochs[kept is not None], kept, label)
    wanted = [label for label in methods if result.wanted(label)]
    rows = result.joined([report.kept("masks", label, methods[label]) for label in wanted])
    result.say(
        "Edge-popup: weights stay ±√2 / √(fan_in · kept) from a seed, the mask is learnt (Adam, learning rate 0.001 for scores, "
        "0.002 for weights, falling along a half cosine; all but LeNet-5 in bfloat16 arithmetic). "
        "'Same': the loaded file predicts the same bits."
    )
    result.table(
        ["network", "weights", "epochs", "accuracy", "file, bytes", "bits per weight", "same", "measured"],
        [
            (r["label"], f"{r['weights']:,}", r["epochs"], f"{100 * r['accuracy']:.2f}%", f"{r['bytes']:,}",
             f"{8 * r['bytes'] / r['weights']:.3f}", "yes" if r["same"] else "no", r["measured"])
            for r in sorted(rows, key=lambda r: [*methods].index(r["label"]))
        ],
    )  # fmt: skip


if __name__ == "__main__":
    report.run("masks", "Supermasks", measure)
