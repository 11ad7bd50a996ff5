"""CIFAR-10 ResNets packed: accuracy on the test images, beside what a user would pick instead."""

from __future__ import annotations

import copy
import statistics
import sys
from typing import Any

import torch

import seedpack
from benchmarks.lib import models, peers, report
from benchmarks.lib.trellises import trellises

IMAGES_AT_ONCE = 500
SCALES = 0.04  # bits per weight that whole bits store beside the streams here: a budget of the same bytes
SEEDS = (0, 1, 2)


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
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        original = models.resnet(name, state)
        rows = [("original", "32", "", f"{accuracy(original, images, labels):.2f}%")]
        budgets = [("trellis", bits + SCALES) for bits in (4.0, 3.0, 2.0)]
        whole = [(codec, bits) for codec in ("trellis", "seedlm") for bits in (4.0, 3.0, 2.0)][:-1]
        for codec, bits in (*budgets, *whole):
            found, stored, error_db = [], 0.0, 0.0
            for seed in SEEDS if codec == "trellis" else SEEDS[:1]:
                out = models.CACHE / f"{name}-{codec}-{bits:g}.safetensors"
                settings = {"seed": seed} if codec == "trellis" else {}
                done = seedpack.compress(file, out, codec=codec, bits=bits, settings=settings, force=True)
                found.append(accuracy(seedpack.load(out, model=models.resnet(name)), images, labels))
                stored, error_db = done.plan.totals()["bits_per_packed_weight"], done.error_db
            label = f"{codec}, {'budget of ' if bits % 1 else ''}{bits:g} bits"
            spread = f" ({min(found):.2f} … {max(found):.2f})" if len(found) > 1 else ""
            rows.append((label, f"{stored:.3f}", f"{error_db:.2f} dB", f"{statistics.mean(found):.2f}%{spread}"))
            print(rows[-1], flush=True)
        for label, (_, quantise) in (peers.data_free() | trellises()).items():
            other = copy.deepcopy(original)
            stored, error_db = peers.replace_weights(other, quantise)
            rows.append((label, f"{stored:.3f}", f"{error_db:.2f} dB", f"{accuracy(other, images, labels):.2f}%"))
            print(rows[-1], flush=True)
        result.say(
            f"## {name}\nAll convolutions and the linear head packed, batch norms as they are; the 10,000 CIFAR-10 test images. "
            f"Rows of trellis are the mean over {len(SEEDS)} seeds of the code (least … most): seeds differ by about as much as "
            "methods of near bits. A budget gives layers different bits at the same bytes; how it weighs them was chosen on "
            "ResNet-32 and these images, among five exponents, so its rows are optimistic there; ResNet-20 had no part in it. "
            "A layer that a peer's groups do not divide stays as it is for that peer, at 16 bits per weight."
        )
        result.table(["method", "bits per weight", "relative error", "accuracy"], rows)


if __name__ == "__main__":
    report.run("images", "CIFAR-10 ResNets, packed", measure)
