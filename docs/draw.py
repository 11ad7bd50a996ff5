"""Draw the pictures of docs/how-it-works.md and docs/training.md, from seedpack's own generators.

python docs/draw.py        (needs matplotlib)
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from seedpack.codecs.mask import frozen_signs
from seedpack.kernels.basis import noise_basis
from seedpack.kernels.rotation import mix
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode_reference import decode
from seedpack.prng import trellis_key

matplotlib.use("Agg")
SIDE = 24
GREY = {"cmap": "RdBu", "vmin": -2.5, "vmax": 2.5}


def panel(axes: pyplot.Axes, values: torch.Tensor, title: str, note: str) -> None:
    axes.imshow(values, **GREY)
    axes.set(title=title, xlabel=note, xticks=[], yticks=[])


def sign(axes: pyplot.Axes, text: str) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=15)


def draw_training() -> Figure:
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
    return figure


def draw_windows() -> Figure:
    """Draw a row's bits, the windows that overlap in them, and the weights that they are the seeds of."""
    code, weights = TrellisCode(4, 16, key=trellis_key(0)), 16
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(0, 256, (1, 1, weights // 2), dtype=torch.uint8, generator=generator)
    bits = (stream.flatten()[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()
    values = decode(stream, code, weights)[0] / 128
    figure, (top, bottom) = pyplot.subplots(2, figsize=(13, 4.6), dpi=110, sharex=True, height_ratios=[3, 2])
    for at, bit in enumerate(bits.tolist()):
        top.add_patch(Rectangle((at, 0), 1, 1, facecolor="#33415c" if bit else "#dfe4ee", edgecolor="white"))
    colours = ("#c1121f", "#e07a1f", "#2a7f62", "#2563ab")
    for s, colour in enumerate(colours):
        top.add_patch(Rectangle((4 * s, -1.1 * (s + 1)), 16, 0.8, facecolor=colour, alpha=0.85))
        top.text(
            4 * s + 8,
            -1.1 * (s + 1) + 0.4,
            f"window {s}: 16 bits, the seed of weight {s}",
            ha="center",
            va="center",
            color="white",
        )
        top.plot([4 * s + 2, 4 * s + 2], [-1.1 * (s + 1), -5.2], color=colour, linestyle=":")
    top.text(0, 1.25, "a row's stream, 4 bits for each weight", fontsize=11)
    top.set(xlim=(0, 64), ylim=(-5.2, 2))
    top.axis("off")
    places = 4 * torch.arange(weights) + 2
    bottom.bar(places, values, width=3, color=[*colours, *["#9aa5b8"] * (weights - 4)])
    bottom.axhline(0, color="black", linewidth=0.8)
    bottom.set(xticks=places, xticklabels=range(weights), xlabel="weight", ylabel="value")
    return figure


def draw_values() -> Figure:
    """Draw the values that a window may stand for: all, and those that are within reach of one window."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 3.6), dpi=110)
    code = TrellisCode(4, 16, key=trellis_key(0))
    every = code.values(torch.arange(1 << 16)).flatten() / 128
    left.hist(every, bins=120, density=True, color="#9aa5b8")
    x = torch.linspace(-4, 4, 200)
    deviation = float(every.std())
    left.plot(x, torch.exp(-((x / deviation) ** 2) / 2) / (deviation * math.tau**0.5), color="#c1121f")
    left.set(title="all 65,536 windows: nearly a normal distribution", yticks=[], xlabel="value")
    for line, window in enumerate((4, 12_345, 40_000)):
        reach = code.values(((window & 0xFFF) << 4) + torch.arange(16)).flatten() / 128
        right.plot(reach, torch.full((16,), float(line)), "o", color="#2563ab", alpha=0.8)
    right.set(
        title="the 16 weights that can stand before each of three windows: 4 bits choose",
        yticks=[],
        xlabel="value",
        ylim=(-0.6, 2.6),
    )
    return figure


def draw_rotation() -> Figure:
    """Draw a weight with outliers before and after its rotation."""
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.4), dpi=110)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    weight[:, torch.randperm(256, generator=generator)[:6]] *= 8
    signs = torch.randint(0, 2, (256,), generator=generator) * 2.0 - 1
    rotated = mix(weight * signs)
    for at, (values, title) in enumerate(((weight, "a weight with six loud channels"), (rotated, "the same, rotated"))):
        axes[at].imshow(values, cmap="RdBu", vmin=-6, vmax=6, aspect="auto")
        axes[at].set(title=title, xticks=[], yticks=[], xlabel="input channels", ylabel="outputs")
    for values, label, colour in ((weight, "before", "#9aa5b8"), (rotated, "after", "#2563ab")):
        axes[2].hist(
            (values / values.std()).flatten(),
            bins=120,
            range=(-8, 8),
            histtype="step",
            label=label,
            color=colour,
            log=True,
        )
    axes[2].set(title="values, in standard deviations", yticks=[])
    axes[2].legend()
    return figure


def draw_product() -> Figure:
    """Draw what a product reads: a dense weight, or codes from which the weight is made in registers."""
    figure, axes = pyplot.subplots(figsize=(13, 3.6), dpi=110)
    axes.set(xlim=(0, 26), ylim=(0, 7))
    axes.axis("off")

    def box(x: float, y: float, width: float, text: str, colour: str) -> None:
        axes.add_patch(FancyBboxPatch((x, y), width, 1.8, boxstyle="round,pad=0.1", facecolor=colour, edgecolor="none"))
        axes.text(x + width / 2, y + 0.9, text, ha="center", va="center", fontsize=10)

    def arrow(x: float, y: float, text: str = "", length: float = 1.2) -> None:
        axes.annotate("", (x + length, y + 0.9), (x, y + 0.9), arrowprops={"arrowstyle": "->"})
        axes.text(x + length / 2, y + 1.2, text, ha="center", fontsize=9)

    axes.text(0, 6.6, "memory", fontsize=11, weight="bold")
    axes.text(13.3, 6.6, "processor", fontsize=11, weight="bold")
    axes.axvline(12.6, color="#9aa5b8", linestyle=":")
    for y, label, bits, colour in ((4.2, "dense weight, bfloat16", 16, "#f3c9c9"), (0.6, "codes", 4, "#cfe3d6")):
        width = 10 * bits / 16
        box(0.2, y, width, label, colour)
        arrow(width + 0.6, y, f"{bits} bits per weight", 13.0 - width - 0.6)
    box(13.4, 4.2, 8, "weight × activations", "#dfe4ee")
    box(13.4, 0.6, 3.2, "window →\nmultiply, add", "#cfe3d6")
    arrow(16.8, 0.6, length=0.8)
    box(17.8, 0.6, 3.6, "weight ×\nactivations", "#dfe4ee")
    for y in (4.2, 0.6):
        arrow(21.7, y)
        box(23.2, y, 2.2, "output", "#dfe4ee")
    return figure


PICTURES = {
    "how-windows": draw_windows,
    "how-values": draw_values,
    "how-rotation": draw_rotation,
    "how-product": draw_product,
    "training": draw_training,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        picture = draw()
        picture.tight_layout()
        picture.savefig(Path(__file__).parent / f"{name}.png")
