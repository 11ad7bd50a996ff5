"""Photographs as coefficients beside JPEG, JPEG 2000 and WebP at the same bytes: PSNR, MS-SSIM and time over Kodak images."""

from __future__ import annotations

import io
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import seedpack
from benchmarks.lib import models, plots, report
from seedpack import image
from seedpack.reparam import basis_

FOLDER = models.DATA / "kodak"
RATES = (0.2, 0.3, 0.5, 1.0)  # bits per pixel of the whole file
OTHERS: dict[str, Callable[[int], dict[str, Any]]] = {  # options for a setting from 0 to 100
    "JPEG": lambda setting: {"quality": setting, "optimize": True, "progressive": True},
    "JPEG2000": lambda setting: {
        "quality_mode": "rates", "quality_layers": [24 / (0.02 * 1.06**setting)], "irreversible": True, "mct": 1
    },
    "WEBP": lambda setting: {"quality": setting, "method": 6},
}  # fmt: skip
NAMES = {"JPEG2000": "JPEG 2000", "WEBP": "WebP"}
PREFIXES = (0.25, 0.5, 0.75)


def quality(found: Tensor, pixels: Tensor) -> dict[str, float]:
    """PSNR in dB over all channels, and MS-SSIM, of uint8 [height, width, channels]."""
    from pytorch_msssim import ms_ssim

    a, b = (x.permute(2, 0, 1)[None].float() for x in (found, pixels))
    return {
        "psnr": -10 * math.log10(float((a - b).square().mean()) / 255**2),
        "ms_ssim": float(ms_ssim(a, b, data_range=255)),
    }


def ours(file: Path, rate: float) -> dict[str, Any]:
    pixels = image.read(file)
    size = int(rate * pixels[..., 0].numel() / 8)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "packed.spi"
        made = image.compress(pixels, packed, size=size)
        started = time.perf_counter()
        found = image.decompress(packed)
        spent = time.perf_counter() - started
        early = {
            f"psnr at {share}": quality(image.decompress(packed, fraction=share), pixels)["psnr"] for share in PREFIXES
        }
    return {
        "family": "seedpack", "rate": made.bits_per_pixel, **quality(found, pixels), **early,
        "encode": made.seconds, "decode": spent, "cores": torch.get_num_threads(),
    }  # fmt: skip


def other(file: Path, kind: str, rate: float) -> dict[str, Any]:
    """Another format between the two settings whose sizes are around: PSNR and MS-SSIM interpolated by size."""
    pixels = image.read(file)
    picture, count = Image.fromarray(pixels.numpy()), pixels[..., 0].numel()

    def coded(setting: int) -> bytes:
        stream = io.BytesIO()
        picture.save(stream, kind, **OTHERS[kind](setting))
        return stream.getvalue()

    below, above = 0, 100  # sizes grow with the setting
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if 8 * len(coded(middle)) <= rate * count else (below, middle)
    started = time.perf_counter()
    data = [coded(below), coded(above)]
    encode = (time.perf_counter() - started) / 2
    started = time.perf_counter()
    found = [quality(torch.from_numpy(np.array(Image.open(io.BytesIO(each)))), pixels) for each in data]
    sizes = [8 * len(each) / count for each in data]
    share = min(1.0, max(0.0, (rate - sizes[0]) / (sizes[1] - sizes[0])))
    between = {key: (1 - share) * found[0][key] + share * found[1][key] for key in found[0]}
    started = time.perf_counter()
    np.array(Image.open(io.BytesIO(data[0])))
    return {
        "family": NAMES.get(kind, kind), "rate": max(rate, sizes[0]), **between,
        "encode": encode, "decode": time.perf_counter() - started, "cores": 1,
    }  # fmt: skip


class Siren(nn.Module):
    """Coordinates to colours through sines (Sitzmann et al., arXiv 2006.09661)."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        sizes = [2, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.last = nn.Linear(width, 3)
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            bound = 1 / 2 if number == 0 else math.sqrt(6 / width) / 30
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        y: Tensor = self.last(x)
        return y


def siren(file: Path, rate: float, minutes: float) -> dict[str, Any]:
    """A network of coordinates alone, all its weights one combination of bases, for as long as is given."""
    pixels = image.read(file)
    height, width, _ = pixels.shape
    x = torch.stack(torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"), -1)
    x, y = x.view(-1, 2), pixels.view(-1, 3).float() / 255 - 0.5
    torch.manual_seed(0)
    count = int(rate * height * width / 8) - 1500  # of a byte each, beside the header
    model = basis_(Siren(64, 5), count, per="model", coef_bits=8)
    optimiser = torch.optim.Adam(model.parameters(), 0.1 * count**-0.5)
    started = time.perf_counter()
    steps = 0
    while (spent := time.perf_counter() - started) < 60 * minutes:
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * count**-0.5 * (0.5 + 0.5 * math.cos(math.pi * spent / 60 / minutes))
        some = torch.randint(len(x), (1 << 15,))
        loss = (model(x[some]) - y[some]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
        if steps % 100 == 0:
            print(f"SIREN: {spent:.0f} s, {-10 * math.log10(loss.item()):.2f} dB", file=sys.stderr)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "siren.safetensors"
        seedpack.save(model, packed)
        found = model.eval()(x).view_as(pixels)
        size = packed.stat().st_size
    whole = ((found + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
    return {
        "family": "SIREN", "rate": 8 * size / (height * width), **quality(whole, pixels), "encode": 60 * minutes,
        "decode": 0.0, "cores": torch.get_num_threads(), "steps": steps,
    }  # fmt: skip


def crossing(means: dict[tuple[str, float], dict[str, float]], kind: str) -> str:
    """Where our mean PSNR passes another format's, at our files' sizes."""
    rates = [means["seedpack", rate]["rate"] for rate in RATES]
    theirs = np.interp(np.log(rates), np.log(RATES), [means[kind, rate]["psnr"] for rate in RATES])
    gaps = [means["seedpack", rate]["psnr"] - other for rate, other in zip(RATES, theirs, strict=True)]
    sizes = ", ".join(f"{rate:.2f}" for rate in rates)
    said = ", ".join(f"{gap:+.2f}" for gap in gaps) + f" dB at {sizes} bits per pixel"
    for i in range(1, len(RATES)):
        if gaps[i - 1] * gaps[i] < 0:
            share = gaps[i - 1] / (gaps[i - 1] - gaps[i])
            said += f"; the curves cross at {rates[i - 1] + share * (rates[i] - rates[i - 1]):.2f}"
    return said


def measure(result: report.Result) -> None:
    files = sorted(FOLDER.glob("*.png"))

    def methods() -> Iterator[tuple[str, Any]]:
        for rate in RATES:
            for file in files:
                yield f"seedpack, {file.stem}, {rate}", lambda file=file, rate=rate: ours(file, rate)
                for kind in OTHERS:
                    yield (
                        f"{kind}, {file.stem}, {rate}",
                        lambda file=file, rate=rate, kind=kind: other(file, kind, rate),
                    )
        yield f"SIREN, {files[2].stem}, 0.3", lambda: siren(files[2], 0.3, 10)

    wanted = [(label, how) for label, how in methods() if result.wanted(label)]
    rows = {r["label"]: r for r in result.joined([report.kept("kodak", label, how) for label, how in wanted])}
    means: dict[tuple[str, float], dict[str, float]] = {}
    for rate in RATES:
        for kind in ("seedpack", *OTHERS):
            some = [row for label, row in rows.items() if label.startswith(f"{kind}, ") and label.endswith(f", {rate}")]
            if some:
                keys = [key for key, value in some[0].items() if type(value) is float]
                means[kind, rate] = {key: statistics.mean(r[key] for r in some) for key in keys} | {"images": len(some)}
    result.say(
        f"{len(files)} Kodak images of 768 × 512; whole files, headers counted; JPEG (progressive, optimised Huffman tables), JPEG "
        "2000 (9/7, colour transform) and WebP (method 6) by Pillow at the setting next to that size, interpolated. Means over the images. Seconds: seedpack's on "
        f"{max((r['cores'] for r in rows.values()), default=0)} cores."
    )
    result.table(
        ["bits per pixel", "format", "images", "PSNR, dB", "MS-SSIM", "encode, s", "decode, s"],
        [
            (f"{m['rate']:.3f}", NAMES.get(kind, kind), m["images"], f"{m['psnr']:.2f}", f"{m['ms_ssim']:.4f}",
             f"{m['encode']:.3f}", f"{m['decode']:.3f}")
            for (kind, _), m in means.items()
        ],
    )  # fmt: skip
    for kind in OTHERS:
        if all((family, rate) in means for family in ("seedpack", kind) for rate in RATES):
            result.say(f"Mean PSNR over that of {NAMES.get(kind, kind)}: {crossing(means, kind)}.")
    prefixes = [(f"{rate}", *(f"{m[f'psnr at {share}']:.2f}" for share in PREFIXES), f"{m['psnr']:.2f}")
                for (kind, rate), m in means.items() if kind == "seedpack"]  # fmt: skip
    result.say("PSNR of the beginning of a file, by the share of its levels:")
    result.table(["bits per pixel", *map(str, PREFIXES), "all"], prefixes)
    for label, row in rows.items():
        if label.startswith("SIREN"):
            beside = rows.get(label.replace("SIREN", "seedpack"), {"psnr": math.nan})
            result.say(
                f"A SIREN (five layers of 64) whose weights are one combination of bases, {label.partition(', ')[2]} bits per pixel, "
                f"{row['encode'] / 60:.0f} minutes: {row['psnr']:.2f} dB, where the bands have {beside['psnr']:.2f}."
            )
    drawn = [{**m, "family": NAMES.get(kind, kind)} for (kind, _), m in means.items()]
    if drawn:
        plots.curves(result, drawn, "psnr", "PSNR (dB)", f"{len(files)} Kodak images", (0.15, 1.05), "psnr",
                     ("rate", "bits per pixel"), "")  # fmt: skip


if __name__ == "__main__":
    report.run("kodak", "Images as coefficients", measure)
