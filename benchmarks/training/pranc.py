"""Networks that are a few coefficients: accuracy against coefficients and bytes, beside all weights and pruning."""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import seedpack
from benchmarks.lib import models, pictures, plots, report
from benchmarks.lib.classifiers import LeNet, ResNet20, accuracy, learning_rate, prepared, train
from seedpack.codecs.svd import SVDCodec
from seedpack.formats import Checkpoint
from seedpack.formats.header import level_of
from seedpack.reparam import basis_
from seedpack.reparam.basis import BasisPiece

EPOCHS, LR_DENSE = 10, 2e-3
LEVELS = 8
COUNTS = (440, 1000, 2221, 5000, 10000)  # 2,221 is 5% of LeNet's parameters
SETS = {"MNIST": pictures.mnist, "Fashion-MNIST": pictures.fashion_mnist}


@functools.cache
def data(name: str) -> pictures.Pictures:
    return prepared(SETS[name]())


def start() -> LeNet:
    torch.manual_seed(0)
    return LeNet()


def saved(model: nn.Module) -> tuple[float, int, int]:
    """Return whether the loaded file predicts the same bits, the file's bytes, and those of its coefficients."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "net.safetensors"
        seedpack.save(model, file)
        loaded = seedpack.load(file, model=LeNet()).eval()
        x = data("MNIST").test[:500]
        with Checkpoint(file) as checkpoint:
            stored = sum(
                len(part.data) for name in checkpoint.manifest.tensors for part in checkpoint.parts(name).values()
            )
        return float(torch.equal(loaded(x), model(x))), file.stat().st_size, stored


def dense(name: str) -> dict[str, Any]:
    model = train(start(), data(name), EPOCHS, LR_DENSE, label=f"{name}, all weights")
    keep(model, name)
    count = sum(p.numel() for p in model.parameters())
    return {"accuracy": accuracy(model, data(name)), "trained": count, "bytes": 4 * count}


def keep(model: nn.Module, name: str) -> None:
    """The dense network, for pruning."""
    folder = models.CACHE / "lenet"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / f"{name}.pt")


def based(name: str, count: int, **settings: Any) -> dict[str, Any]:
    epochs = settings.pop("epochs", EPOCHS)
    model = basis_(start(), count, **settings)
    started = time.perf_counter()
    train(model, data(name), epochs, learning_rate(count), label=f"{name}, {count} coefficients {settings or ''}")
    seconds = time.perf_counter() - started
    same, size, stored = saved(model)
    return {"accuracy": accuracy(model, data(name)), "trained": count, "bytes": stored, "file": size, "same": same,
            "seconds": seconds}  # fmt: skip


def pruned(name: str, stored: int) -> dict[str, Any]:
    """Keep as many weights as the bytes hold with 16 bits per weight and the mask at its entropy: the largest of a trained network,
    which is trained on while ever more become zero, by the cube of what is left of the first 60% of the steps (Zhu and Gupta,
    arXiv 1710.01878)."""
    model = start()
    dense_state(model, name)
    total, kept = sum(p.numel() for p in model.parameters()), 1
    while (kept + 1) * 16 + entropy((kept + 1) / total) * total <= 8 * stored:
        kept += 1
    ramp, steps = 0.6 * EPOCHS * -(-len(data(name).train) // 128), 0

    @torch.no_grad()
    def prune() -> None:
        nonlocal steps
        steps += 1
        left = kept + round((total - kept) * (1 - min(1.0, steps / ramp)) ** 3)
        sizes = torch.cat([p.flatten() for p in model.parameters()]).abs()
        limit = sizes.kthvalue(total - left + 1).values
        for parameter in model.parameters():
            parameter.mul_(parameter.abs() >= limit)

    train(model, data(name), EPOCHS, LR_DENSE, label=f"{name}, {kept} weights left", after_step=prune)
    return {"accuracy": accuracy(model, data(name)), "trained": kept, "bytes": stored}


def cut(name: str, make: Callable[[Path], object]) -> list[dict[str, Any]]:
    """A file in eight levels, made by a function: accuracy and bytes received for each count of them."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.safetensors"
        make(file)
        with Checkpoint(file) as checkpoint:
            infos = checkpoint.files[0].header.tensors
            start = checkpoint.files[0].header.data_start
            last = {
                level: max(info.end for key, info in infos.items() if level_of(key) <= level) for level in range(LEVELS)
            }
        data_of = file.read_bytes()
        for level, end in last.items():
            file.write_bytes(data_of[: start + end])
            net = seedpack.load(file, model=LeNet(), fraction=1.0).eval()
            rows.append({"levels": level + 1, "bytes": start + end, "accuracy": accuracy(net, data(name))})
    return rows


def by_levels(name: str, nested: bool) -> dict[str, Any]:
    """A combination of bases whose first coefficients are trained to do alone, or only stored in order."""
    model = basis_(start(), COUNTS[2], coef_bits=8, levels=LEVELS)
    if not nested:
        for piece in (m for m in model.modules() if isinstance(m, BasisPiece)):
            piece.basis.nested = False
    train(
        model,
        data(name),
        EPOCHS,
        learning_rate(COUNTS[2]),
        label=f"{name}, levels, {'nested' if nested else 'not nested'}",
    )
    return {"curve": cut(name, lambda file: seedpack.save(model, file))}


def svd_by_levels(name: str) -> dict[str, Any]:
    """The dense network's weights by SVD, the ranks in order."""
    model = start()
    dense_state(model, name)
    codec = SVDCodec(rank=64, levels=LEVELS)
    return {"curve": cut(name, lambda file: seedpack.compress(model, file, codec=codec))}


def dense_state(model: nn.Module, name: str) -> None:
    """The weights of the trained dense network."""
    file = models.CACHE / "lenet" / f"{name}.pt"
    if not file.is_file():
        dense(name)
    model.load_state_dict(torch.load(file, weights_only=True))


def from_trained(name: str, make: Callable[[nn.Module], nn.Module], epochs: int) -> dict[str, Any]:
    """The trained dense network brought to a method, and trained on to predict what it did."""
    teacher, model = start(), start()
    for each in (teacher, model):
        dense_state(each, name)
    own = [p.detach().clone() for p in teacher.parameters()]
    make(model)
    lost = sum(float((p - q).square().sum()) for p, q in zip(weights_of(model), own, strict=True))
    energy = 1 - lost / sum(float(q.square().sum()) for q in own)
    before = accuracy(model, data(name))
    with torch.no_grad():
        taught = torch.cat([teacher(x).softmax(1) for x in data(name).train.split(1000)])
    rate = learning_rate(sum(p.numel() for p in model.parameters()))
    train(model, data(name)._replace(train_classes=taught), epochs, rate, label=f"{name}, distilled")
    return {"energy": energy, "before": before, "accuracy": accuracy(model, data(name))}


@torch.no_grad()
def weights_of(model: nn.Module) -> list[torch.Tensor]:
    """Weights and biases of LeNet's layers, whatever they are made of."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return [value for layer in layers for value in (layer.weight, layer.bias) if value is not None]


def entropy(share: float) -> float:
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share) if 0 < share < 1 else 0.0


def row(data: str, family: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return {"data": data, "family": family, **run()}


def methods() -> dict[str, tuple[str, str, Callable[[], dict[str, Any]]]]:
    """By label: the data, a family that is drawn as one line, and how."""
    found: dict[str, tuple[str, str, Callable[[], dict[str, Any]]]] = {}
    for name in SETS:
        found[f"{name}: all weights"] = (name, "all weights", functools.partial(dense, name))
        for count in COUNTS:
            found[f"{name}: {count} coefficients, float32"] = (name, "float32", functools.partial(based, name, count))
        for count in COUNTS:
            found[f"{name}: {count} coefficients, 8 bits"] = (
                name, "8 bits", functools.partial(based, name, count, coef_bits=8)
            )  # fmt: skip
        for count in COUNTS[1:]:
            found[f"{name}: pruned to {count} bytes"] = (name, "pruned", functools.partial(pruned, name, count))
    name = "MNIST"
    for bits in (2, 4):
        found[f"{name}: 2221 coefficients, {bits} bits"] = (
            name, "other bits", functools.partial(based, name, 2221, coef_bits=bits)
        )  # fmt: skip
    for label, how in (
        ("nested", lambda: by_levels(name, True)), ("not nested", lambda: by_levels(name, False)),
        ("svd", lambda: svd_by_levels(name)),
    ):  # fmt: skip
        found[f"{name}: in levels, {label}"] = (name, "levels", how)
    for count in (1000, 10_000, 22_213):  # the last is half of its parameters
        found[f"{name}: trained, then {count} coefficients"] = (
            name, "from trained",
            functools.partial(from_trained, name, functools.partial(basis_, count=count, start="weights"), EPOCHS),
        )  # fmt: skip
    for generator in ("hadamard", "philox"):
        found[f"{name}: 440 coefficients, {generator}, 3 epochs"] = (
            name, "generators", functools.partial(based, name, 440, generator=generator, epochs=3)
        )  # fmt: skip
    return found


READY = f"""
import sys
sys.path.insert(0, {str(models.ROOT)!r})
from benchmarks.training.pranc import stepper
step = stepper(COUNT)
step(1)
"""


def stepper(count: int | None) -> Callable[[int], None]:
    """Training steps of ResNet-20, of all weights or of coefficients, on a number of random pictures."""
    torch.manual_seed(0)
    model = ResNet20() if count is None else basis_(ResNet20(), count)
    optimiser = torch.optim.Adam(model.parameters())

    def step(pictures: int) -> None:
        classes = torch.zeros(pictures, dtype=torch.int64)
        nn.functional.cross_entropy(model(torch.randn(pictures, 3, 32, 32)), classes).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def step_times(result: report.Result) -> None:
    """Measure what coefficients add to one training step of ResNet-20, and to its memory."""
    size, count, pictures, times = 269_722, 10_000, 32, 20
    steps = {"all weights": stepper(None), f"{count:,} coefficients": stepper(count)}
    spent: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(times + 2):
        for label, step in steps.items():
            started = time.perf_counter()
            step(pictures)
            spent[label].append(time.perf_counter() - started)
    memory = [report.added_memory(READY.replace("COUNT", str(each)), f"step({pictures})") for each in (None, count)]
    result.say(
        f"## A training step\nResNet-20, {size:,} parameters, {pictures} pictures, {torch.get_num_threads()} cores: medians of "
        f"{times} steps of each kind in turn; memory is what a step adds to a process that has run one of a single picture. "
        f"The weights take {size * 4 / 1e6:.1f} MB."
    )
    medians = [1000 * sorted(found[2:])[times // 2] for found in spent.values()]
    result.table(
        ["trained", "ms per step", "more", "memory of a step, MB", "more"],
        [
            (label, f"{own:.1f}", f"{own - medians[0]:+.1f}", f"{used:.1f}", f"{used - memory[0]:+.1f}")
            for label, own, used in zip(steps, medians, memory, strict=True)
        ],
    )


def measure(result: report.Result) -> None:
    every = methods()
    wanted = {label: how for label, how in every.items() if result.wanted(label)}
    rows = result.joined(
        [
            report.kept("pranc", label, functools.partial(row, data, family, run))
            for label, (data, family, run) in wanted.items()
        ]
    )
    result.say(
        f"LeNet-5 (44,426 parameters), Adam, {EPOCHS} epochs, learning rate {LR_DENSE} for weights and 0.15 / √count for coefficients, "
        "falling along a half cosine; structured bases unless said. Bytes are those of coefficients and their steps; the "
        "file's header of names, shapes and digests comes to them. Pruned: a trained network's largest weights, trained "
        "as long again while the others go to zero step by step, 16 bits per weight and the mask at its entropy. 'Same': the loaded file predicts the same bits."
    )
    order = list(every)
    for name in SETS:
        mine = sorted((r for r in rows if r["data"] == name and "bytes" in r), key=lambda r: order.index(r["label"]))
        if not mine:
            continue
        whole = next((r["accuracy"] for r in mine if r["family"] == "all weights"), None)
        result.say(f"## {name}")
        result.table(
            ["network", "trained numbers", "bytes", "file", "accuracy", "of dense", "same", "seconds", "measured"],
            [
                (r["label"].partition(": ")[2], f"{r['trained']:,}", f"{r['bytes']:,}", f"{r['file']:,}" if "file" in r else "",
                 f"{100 * r['accuracy']:.2f}%", f"{100 * r['accuracy'] / whole:.1f}%" if whole else "",
                 {1.0: "yes", 0.0: "no"}.get(r.get("same", -1), ""), f"{r['seconds']:.0f}" if "seconds" in r else "",
                 r["measured"])
                for r in mine
            ],
        )  # fmt: skip
        drawn = [{**r, "percent": 100 * r["accuracy"]} for r in mine if r["family"] in ("float32", "8 bits", "pruned")]
        plots.curves(
            result, drawn, "percent", "accuracy (%)", f"LeNet-5 on {name}", (300, 50_000), name.lower(),
            ("bytes", "bytes of coefficients, or of weights left"), "x",
        )  # fmt: skip
    curves = [r for r in rows if "curve" in r]
    if curves:
        result.say(
            f"## Files that are cut off\n{COUNTS[2]:,} coefficients of 8 bits in {LEVELS} levels on MNIST: 'nested' trains the "
            "first levels to do alone, 'not nested' only stores the coefficients so; 'svd' are the dense network's layers "
            "by SVD of rank 64 at most. Bytes received of the file, header included, and accuracy."
        )
        result.table(
            ["levels", *(r["label"].rpartition(", ")[2] for r in curves)],
            [
                (i + 1, *(f"{r['curve'][i]['bytes']:,}: {100 * r['curve'][i]['accuracy']:.2f}%" for r in curves))
                for i in range(LEVELS)
            ],
        )
        received = [
            {**point, "percent": 100 * point["accuracy"], "family": r["label"].rpartition(", ")[2]}
            for r in curves for point in r["curve"]
        ]  # fmt: skip
        plots.curves(
            result, received, "percent", "accuracy (%)", "Accuracy against bytes received, MNIST", (3000, 110_000), "levels",
            ("bytes", "bytes received"), "x",
        )  # fmt: skip
    trained = [r for r in rows if "energy" in r]
    if trained:
        result.say(
            '## From a trained network\nThe trained network\'s weights projected on the bases (`start="weights"`), and then '
            f"{EPOCHS} epochs of distillation: what it holds of their energy, and accuracy."
        )
        result.table(
            ["network", "energy kept", "projected", "distilled"],
            [
                (r["label"], f"{100 * r['energy']:.1f}%", f"{100 * r['before']:.2f}%", f"{100 * r['accuracy']:.2f}%")
                for r in sorted(trained, key=lambda r: order.index(r["label"]))
            ],
        )
    step_times(result)


if __name__ == "__main__":
    report.run("pranc", "Networks of a few coefficients", measure)
