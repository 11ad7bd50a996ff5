"""Draw docs/training.png: how weights of a random subspace are made, from seedpack's own generators.

python docs/draw.py        (needs matplotlib)
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot

from seedpack.codecs.mask import frozen_signs
from seedpack.kernels.basis import noise_basis

matplotlib.use("Agg")
SIDE = 24
GREY = {"cmap": "RdBu", "vmin": -2.5, "vmax": 2.5}


def panel(axes: pyplot.Axes, values: torch.Tensor, title: str, note: str) -> None:
    axes.imshow(values, **GREY)
    axes.set(title=title, xlabel=note, xticks=[], yticks=[])


def sign(axes: pyplot.Axes, text: str) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=15)


def main() -> None:
    figure, rows = pyplot.subplots(3, 7, figsize=(13, 6.6), dpi=110, width_ratios=[3, 1, 3, 1, 3, 1, 3])
    coefs = torch.tensor([0.9, -0.4, 1.1])
    bases = [noise_basis("hadamard", 1).dense(row[None], SIDE, SIDE) for row in torch.eye(3)]
    top = rows[0]
    for i in range(2):
        panel(top[2 * i], bases[i], f"basis vector {i + 1}, from the seed", f"times coefficient {coefs[i]:.1f}")
        sign(top[2 * i + 1], "+ … +" if i else "+")
    panel(top[4], bases[2], "basis vector M, from the seed", f"times coefficient {coefs[2]:.1f}")
    sign(top[5], "=")
    panel(
        top[6],
        sum(c * b for c, b in zip(coefs, bases, strict=True)),
        "weight",
        "basis_: M coefficients\nare trained and stored",
    )

    middle = rows[1]
    signs = frozen_signs(1, (SIDE, SIDE), torch.device("cpu"))
    scores = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    mask = scores.abs() > scores.abs().median()
    panel(middle[0], signs, "signs, from the seed", "frozen")
    sign(middle[1], "×")
    panel(middle[2], mask * 2.5, "mask", "the largest scores")
    sign(middle[3], "×")
    sign(middle[4], "scale\n√2 / √(fan in · kept)")
    sign(middle[5], "=")
    panel(middle[6], signs * mask, "weight", "mask_: scores are trained,\nthe mask is stored")

    bottom = rows[2]
    coefs = torch.randn(1, 3, generator=torch.Generator().manual_seed(3))
    noise = noise_basis("philox", 1).dense(coefs, SIDE, SIDE)
    x = torch.randn(SIDE, 1, generator=torch.Generator().manual_seed(4))
    panel(bottom[0], noise * 1.7, "noise · coefficients", "a tile at a time, in registers")
    sign(bottom[1], "·")
    panel(bottom[2], x.expand(-1, 3), "input", "")
    sign(bottom[3], "=")
    panel(bottom[4], (noise @ x).expand(-1, 3), "output", "seedpack.nn: no weight\nin memory")
    for axes in bottom[5:]:
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "training.png")


if __name__ == "__main__":
    main()
