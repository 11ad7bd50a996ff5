"""CIFAR-10 ResNets packed: accuracy on the test images, beside what a user would pick instead."""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import seedpack
from benchmarks.lib import models, peers, report
from benchmarks.lib.trellises import trellises

IMAGES_AT_ONCE = 500
SCALES = 0.04  # bits per weight that whole bits store beside the streams here: a budget of the same bytes
SEEDS = (0, 1, 2)
Way = Callable[[torch.Tensor, torch.Tensor], dict[str, Any]]  # measures a row on images and labels


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Per cent."""
    right = [
        int((model(some).argmax(1) == truth).sum())
        for some, truth in zip(images.split(IMAGES_AT_ONCE), labels.split(IMAGES_AT_ONCE), strict=True)
    ]
    return 100 * sum(right) / len(labels)


def measure(result: report.Result) -> None:
    if not models.resnets():
        print(f"left out: the pretrained ResNets and the test images are not in {models.DATA}", file=sys.stderr)
        raise SystemExit(0)
    images, labels = models.cifar10_test()
    for name, file in models.resnets().items():
        rows = result.rows_of(ways(name, file), lambda way: way(images, labels))
        result.say(
            f"## {name}\nAll convolutions and the linear head packed, batch norms as they are; the 10,000 CIFAR-10 test images. "
            f"Rows of trellis are the mean over {len(SEEDS)} seeds of the code (least … most): seeds differ by about as much as "
            "methods of near bits. A budget gives layers different bits at the same bytes; how it weighs them was chosen on "
            "ResNet-32 and these images, among five exponents, so its rows are optimistic there; ResNet-20 had no part in it. "
            "A layer that a peer's groups do not divide stays as it is for that peer, at 16 bits per weight. SINQ takes groups of 16 or 32 here. AutoRound packs language models alone."
        )
        result.table(
            ["method", "bits per weight", "relative error", "accuracy", "measured"],
            [
                (label.removeprefix(f"{name}: "), f"{row['bits']:.3f}", "" if row["error_db"] is None else f"{row['error_db']:.2f} dB",
                 shown(row["accuracies"]), row["measured"])
                for label, row in rows.items()
            ],
        )  # fmt: skip


def ways(name: str, file: Path) -> dict[str, Way]:
    """List how a model is packed, by label."""
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    original = models.resnet(name, state)

    def unpacked(images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        return {"bits": 32.0, "error_db": None, "accuracies": [accuracy(original, images, labels)]}

    def ours(codec: str, bits: float, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        found = []
        for seed in SEEDS if codec == "trellis" else SEEDS[:1]:
            out = models.CACHE / f"{name}-{codec}-{bits:g}.safetensors"
            settings = {"seed": seed} if codec == "trellis" else {}
            done = seedpack.compress(file, out, codec=codec, bits=bits, settings=settings, force=True)
            found.append(accuracy(seedpack.load(out, model=models.resnet(name)), images, labels))
        stored = done.plan.totals()["bits_per_packed_weight"]
        return {"bits": stored, "error_db": done.error_db, "accuracies": found}

    def theirs(quantise: peers.Quantiser, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        other = copy.deepcopy(original)
        stored, error_db = peers.replace_weights(other, quantise)
        return {"bits": stored, "error_db": error_db, "accuracies": [accuracy(other, images, labels)]}

    budgets = [("trellis", bits + SCALES) for bits in (4.0, 3.0, 2.0)]
    whole = [(codec, bits) for codec in ("trellis", "seedlm") for bits in (4.0, 3.0, 2.0)][:-1]
    found: dict[str, Way] = {"original": unpacked}
    for codec, bits in (*budgets, *whole):
        found[f"{codec}, {'budget of ' if bits % 1 else ''}{bits:g} bits"] = partial(ours, codec, bits)
    found |= {label: partial(theirs, quantise) for label, (_, quantise) in (peers.data_free() | trellises()).items()}
    return {f"{name}: {label}": way for label, way in found.items()}


def shown(accuracies: list[float]) -> str:
    """The mean, and of several the least and the most."""
    spread = f" ({min(accuracies):.2f} … {max(accuracies):.2f})" if len(accuracies) > 1 else ""
    return f"{statistics.mean(accuracies):.2f}%{spread}"


if __name__ == "__main__":
    report.run("images", "CIFAR-10 ResNets, packed", measure)
