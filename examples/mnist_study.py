"""Truncate the singular values of a layer of MNIST classifiers: effective ranks while training, accuracy
against rank, randomized against exact SVD with its bound, and seedpack's codecs at the same bytes."""

from __future__ import annotations

import copy
import functools
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

import seedpack
from benchmarks.lib import pictures
from benchmarks.lib.classifiers import accuracy, prepared, train
from seedpack.errors import SeedpackError
from seedpack.linalg import effective_rank, randomized_svd, singular_values

PENALTIES = {"baseline": (0, 0.0), "L2": (2, 1e-5), "L1": (1, 2e-6)}  # power of the weights, and its factor
LEARNING_RATE = 2e-4  # falls to zero along a half cosine
DRAWS = 5
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)


class Classifier(nn.Sequential):
    """784-1000-1000-10, ReLU, dropout; the layer that is studied is the 1000×1000 one."""

    def __init__(self, middle: nn.Module | None = None):
        middle = middle or nn.Linear(1000, 1000)
        super().__init__(
            nn.Flatten(), nn.Linear(784, 1000), nn.ReLU(), nn.Dropout(0.2), middle, nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(1000, 10),
        )  # fmt: skip

    @property
    def middle(self) -> Any:
        """The layer."""
        return self[4]


@torch.no_grad()
def loss_and_accuracy(model: nn.Module, data: pictures.Pictures) -> tuple[float, float]:
    """Return the loss and accuracy on the test pictures; percent."""
    model.eval()
    parts = zip(data.test.split(1000), data.test_classes.split(1000), strict=True)
    total = sum(float(nn.functional.cross_entropy(model(x), classes, reduction="sum")) for x, classes in parts)
    return total / len(data.test), 100 * accuracy(model, data)


def rank_of(model: Classifier) -> float:
    """Effective rank of the layer."""
    return effective_rank(singular_values(model.middle.weight.detach()))


def three_models(data: pictures.Pictures, epochs: int) -> dict[str, tuple[Classifier, list[float]]]:
    """Trained with each penalty, and the layer's effective rank after each epoch."""
    found = {}
    for name, (power, factor) in PENALTIES.items():
        torch.manual_seed(0)
        model = Classifier()
        ranks = [rank_of(model)]
        weights = [p for p in model.parameters() if p.dim() == 2]

        def penalty(weights: list[Tensor] = weights, power: int = power, factor: float = factor) -> Tensor:
            return factor * torch.stack([w.abs().pow(power).sum() for w in weights]).sum()

        def track(model: Classifier = model, ranks: list[float] = ranks) -> None:
            ranks.append(rank_of(model))

        train(model, data, epochs, LEARNING_RATE, label=name, after_epoch=track, extra_loss=penalty if power else None)
        found[name] = (model, ranks)
    return found


def with_weight(model: Classifier, weight: Tensor) -> Classifier:
    """A copy with another weight in the layer."""
    other = copy.deepcopy(model)
    other.middle.weight.data = weight
    return other


def truncated(model: Classifier, data: pictures.Pictures) -> dict[str, list[tuple[float, float]]]:
    """Loss and accuracy for each rank, by exact and by randomized SVD."""
    weight = model.middle.weight.detach()
    u, s, vh = torch.linalg.svd(weight)
    found: dict[str, list[tuple[float, float]]] = {"SVD": [], "randomized SVD": []}
    for rank in RANKS:
        found["SVD"].append(loss_and_accuracy(with_weight(model, (u[:, :rank] * s[:rank]) @ vh[:rank]), data))
        left, middle, right = randomized_svd(weight, rank)
        found["randomized SVD"].append(loss_and_accuracy(with_weight(model, (left * middle) @ right), data))
    return found


def range_finder(weight: Tensor) -> list[dict[str, float]]:
    """‖A − QQᵀA‖_F of a Gaussian range finder of k + p columns (mean of some draws), the optimal error of rank k, and the bound on the
    mean (Halko, Martinsson and Tropp 2011, Theorem 10.5; without power iterations)."""
    values, rows = torch.linalg.svdvals(weight.double()), []
    weight = weight.double()
    for rank in (16, 64):
        best = float(values[rank:].square().sum().sqrt())
        for oversampling in (2, 4, 8, 16, 64):
            for power in (0, 1, 2):
                errors, seconds = [], 0.0
                for seed in range(DRAWS):
                    draw = torch.Generator().manual_seed(seed)
                    omega = torch.randn(weight.shape[1], rank + oversampling, generator=draw, dtype=torch.float64)
                    started = time.perf_counter()
                    q = torch.linalg.qr(weight @ omega).Q
                    for _ in range(power):
                        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ q).Q).Q
                    seconds += time.perf_counter() - started
                    errors.append(float((weight - q @ (q.T @ weight)).norm()))
                bound = math.sqrt(1 + rank / (oversampling - 1)) * best
                rows.append(
                    {"rank": rank, "oversampling": oversampling, "power": power, "error": sum(errors) / DRAWS, "best": best,
                     "bound": bound, "ms": 1000 * seconds / DRAWS}
                )  # fmt: skip
    return rows


def times(weight: Tensor) -> list[tuple[int, float, float, float]]:
    """For each rank: seconds of exact and randomized SVD, and the error over the optimal one."""
    started = time.perf_counter()
    u, s, vh = torch.linalg.svd(weight)
    exact, rows = time.perf_counter() - started, []
    for rank in RANKS[3:-2]:
        started = time.perf_counter()
        left, middle, right = randomized_svd(weight, rank)
        spent = time.perf_counter() - started
        best = float((weight - (u[:, :rank] * s[:rank]) @ vh[:rank]).norm())
        rows.append((rank, exact, spent, float((weight - (left * middle) @ right).norm()) / best))
    return rows


def by_codecs(model: Classifier, data: pictures.Pictures) -> dict[str, list[tuple[float, float]]]:
    """(Bytes of the layer in the file, accuracy) of each codec, the other layers as they are."""
    from seedpack.codecs.basis import BasisCodec
    from seedpack.codecs.mask import MaskCodec
    from seedpack.codecs.seedlm import SeedLMCodec
    from seedpack.codecs.svd import SVDCodec
    from seedpack.codecs.trellis import TrellisCodec

    tried: dict[str, list[Any]] = {
        "trellis": [TrellisCodec(code_bits=bits) for bits in (1, 2, 3, 4)],
        "seedlm": [SeedLMCodec.from_bits(bits) for bits in (3, 4)],
        "svd": [SVDCodec(rank=rank) for rank in (8, 16, 32, 64, 128, 250)],
        "basis": [BasisCodec(count=count, coef_bits=8) for count in (31_250, 125_000, 250_000, 500_000)],
        "mask": [MaskCodec(kept=0.5), MaskCodec(kept=0.1)],
    }
    shape, found = (1000, 1000), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, codecs in tried.items():
            found[name] = []
            for number, codec in enumerate(codecs):
                file = Path(folder) / f"{name}-{number}.safetensors"
                try:
                    seedpack.compress(model, file, codec=codec, include=["4.weight"])
                except SeedpackError as error:
                    print(f"{name} left out: {error}", file=sys.stderr)
                    break
                packed = seedpack.load(file, model=Classifier())
                size = codec.bits_per_weight(shape) * math.prod(shape) / 8
                found[name].append((size, 100 * accuracy(packed, data)))
                print(f"{codec}: {size:,.0f} bytes, {found[name][-1][1]:.2f}%", file=sys.stderr)
    return {name: points for name, points in found.items() if points}


def factors(data: pictures.Pictures, epochs: int, rank: int) -> Classifier:
    """The layer as U·V from the start, trained directly."""
    torch.manual_seed(0)
    model = Classifier(nn.Sequential(nn.Linear(1000, rank, bias=False), nn.Linear(rank, 1000)))
    train(model, data, epochs, LEARNING_RATE, label=f"factors of rank {rank}")
    return model


def figure_of(draws: list[Callable[[Any], None]], file: Path) -> None:
    """Panels side by side, if matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(draws), figsize=(5.5 * len(draws), 4.2), dpi=110)
    for axes, draw in zip(panels, draws, strict=True):
        draw(axes)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
    print(f"plot: {file}")


def main() -> None:
    parser = common.options(__doc__, "mnist-study")
    parser.set_defaults(epochs=8)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    data = prepared(pictures.fashion_mnist() if options.fashion else pictures.mnist())
    data = data._replace(train=data.train[: options.limit], train_classes=data.train_classes[: options.limit])

    models = three_models(data, options.epochs)
    print("\nmodel     loss    accuracy  effective rank of 1000×1000")
    for name, (model, ranks) in models.items():
        loss, right = loss_and_accuracy(model, data)
        print(f"{name:<9} {loss:.4f}  {right:.2f}%    {ranks[-1]:.1f} (at the start {ranks[0]:.1f})")

    curves = {name: truncated(model, data) for name, (model, _) in models.items()}
    print("\nrank      " + "".join(f"{name + how:<26}" for name in models for how in (", SVD", ", randomized")))
    for i, rank in enumerate(RANKS):
        print(f"{rank:<10}" + "".join(f"{points[i][1]:.2f}%, loss {points[i][0]:.3f}".ljust(26)
              for curve in curves.values() for points in curve.values()))  # fmt: skip
    for name, curve in curves.items():
        whole = curve["SVD"][-1]
        better = [rank for rank, point in zip(RANKS[:-1], curve["SVD"], strict=False) if point[1] > whole[1]]
        print(f"{name}: ranks that beat the whole layer's accuracy: {better or 'none'}")

    weight = models["baseline"][0].middle.weight.detach()
    found = range_finder(weight)
    print("\nrank  oversampling  power  error / optimal  bound / optimal  ms")
    for row in found:
        print(f"{row['rank']:<5} {row['oversampling']:<13} {row['power']:<6} {row['error'] / row['best']:<16.4f} "
              f"{row['bound'] / row['best'] if not row['power'] else float('nan'):<16.4f} {row['ms']:.1f}")  # fmt: skip
    print("\nrank  exact SVD, s  randomized, s  times faster  error / optimal")
    for rank, exact, spent, ratio in times(weight):
        print(f"{rank:<5} {exact:<13.3f} {spent:<14.4f} {exact / spent:<13.1f} {ratio:.4f}")

    whole_accuracy = curves["baseline"]["SVD"][-1][1]
    packed = by_codecs(models["baseline"][0], data)
    print("\ncodec     bytes of the layer: accuracy")
    for name, points in packed.items():
        print(f"{name:<9} " + ", ".join(f"{size:,.0f}: {right:.2f}%" for size, right in points))
    direct = {rank: loss_and_accuracy(factors(data, options.epochs // 2, rank), data) for rank in (8, 32)}
    for rank, (loss, right) in direct.items():
        print(f"factors of rank {rank}, trained directly: {right:.2f}%, loss {loss:.4f}")

    def draw_ranks(axes: Any) -> None:
        for name, (_, ranks) in models.items():
            axes.plot(ranks, marker="o", label=name)
        axes.set(xlabel="epoch", ylabel="effective rank", title="The 1000×1000 layer while training")

    def draw_truncated(axes: Any, which: int, of: Callable[[float], float], label: str) -> None:
        for name, curve in curves.items():
            line = axes.plot(RANKS, [of(p[which]) for p in curve["SVD"]], marker="o", label=f"{name}, SVD")
            axes.plot(RANKS, [of(p[which]) for p in curve["randomized SVD"]], marker="x", linestyle="--",
                      color=line[0].get_color(), label=f"{name}, randomized")  # fmt: skip
        axes.scatter(list(direct), [of(p[which]) for p in direct.values()], color="black", zorder=3,
                     label="factors trained directly")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="rank", ylabel=label, title="Truncated")

    def draw_bound(axes: Any) -> None:
        for power in (0, 1, 2):
            some = [row for row in found if row["rank"] == 64 and row["power"] == power]
            axes.plot([r["oversampling"] for r in some], [r["error"] / r["best"] for r in some], marker="o",
                      label=f"measured, {power} power iterations")  # fmt: skip
        some = [row for row in found if row["rank"] == 64 and row["power"] == 0]
        axes.plot([r["oversampling"] for r in some], [r["bound"] / r["best"] for r in some], color="black",
                  linestyle="--", label="bound on the mean, none")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="oversampling", ylabel="error over the optimal one",
                 title="Range finder, rank 64")  # fmt: skip
        axes.set_xticks([r["oversampling"] for r in some], [r["oversampling"] for r in some])
        axes.tick_params(axis="x", which="minor", labelbottom=False)

    def draw_codecs(axes: Any) -> None:
        for name, points in packed.items():
            axes.plot([size for size, _ in points], [100 - right for _, right in points], marker="o", label=name)
        axes.axhline(100 - whole_accuracy, color="black", linestyle="--", label="4,000,000 bytes, float32")
        axes.set(xscale="log", yscale="log", xlabel="bytes of the layer", ylabel="errors (%)", title="Codecs")

    errors = functools.partial(draw_truncated, which=1, of=lambda right: 100 - right, label="errors (%)")
    losses = functools.partial(draw_truncated, which=0, of=lambda loss: loss, label="loss")
    figure_of([draw_ranks, errors, losses], options.output / "ranks.png")
    figure_of([draw_bound, draw_codecs], options.output / "codecs.png")


if __name__ == "__main__":
    main()
