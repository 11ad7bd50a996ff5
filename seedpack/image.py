"""Images as coefficients: `compress` fits a neural field to one image and writes a seedpack checkpoint; `decompress` renders it.

The field is a pyramid of grids of whole numbers and a small network whose weights are one combination of pseudorandom bases
(PRANC, arXiv 2206.08464). Both are trained on the one image for squared error and coded bits together, as COIN (arXiv
2103.03123) and COOL-CHIC (arXiv 2212.05458) do; see `docs/images.md`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seedpack.api import WRITER
from seedpack.codecs.base import matrix_shape
from seedpack.codecs.field import PARTS, Field, FieldCodec, packed, rendered
from seedpack.errors import ModelError
from seedpack.fields.coding import LIMIT
from seedpack.fields.network import COLOURS, Network, cells_of
from seedpack.formats import Checkpoint, CheckpointWriter, PlannedTensor, staged
from seedpack.formats.writer import file_bytes
from seedpack.model.sources.base import first_line
from seedpack.model.stored import stored_dense

NAME = "image"
STEPS = 600
FIRST_PRICE, REACTION = 6e-3, 0.06
CHECKED = 20  # every so many steps, after the first quarter
CLOSE = 0.02  # 2% of the bits, or 0.04 dB
BY_CHANCE = 0.9  # of the steps
FINE = 0.35  # bits a pixel from which a number for each pixel pays
HEADROOM = 12  # bytes that larger numbers of bytes may add to the header
Watch = Callable[[int], object]


@dataclass(frozen=True)
class Report:
    """What `compress` made.

    Attributes:
        file_bytes: of the file, header and all.
        bits_per_pixel: the same.
        psnr: of the decoded image, in dB.
        seconds: it took.
    """

    path: Path
    file_bytes: int
    bits_per_pixel: float
    psnr: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {**self.__dict__, "path": str(self.path)}


class _Fit(nn.Module):
    """A field while it is trained: grids in the codes' unit, coefficients, and how bits follow from what is near a code."""

    def __init__(self, image: Tensor, codec: FieldCodec):
        super().__init__()
        self.cells = cells_of(image)[None]
        self.network = codec.network((image.shape[1], image.shape[2] * codec.channels))
        self.noise = torch.Generator().manual_seed(codec.seed)
        self.coefs = nn.Parameter(torch.randn(1, codec.count, generator=self.noise) * codec.count**-0.5)
        self.grids = nn.ParameterList(_pyramid(image, self.network))
        self.sizes = nn.Parameter(torch.tensor([-0.5, 0.5, 0.4]).repeat(len(self.grids), 2, 1))
        self.around = torch.tensor([[1.0, 2.0, 1.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])[None, None] / 6

    @property
    def step(self) -> float:
        """Of the coefficients' codes."""
        return max(float(self.coefs.detach().abs().max()), 1e-6) / LIMIT

    def forward(self) -> tuple[Tensor, Tensor]:
        """Mean squared error, and expected bits; differentiable as if nothing were rounded. In training numbers are rounded up
        or down by chance, in proportion, so that both are smooth in the grids; in evaluation to the nearest."""
        whole = [_straight(grid, grid.clamp(-LIMIT, LIMIT).round()) for grid in self.grids]
        codes = whole
        if self.training:
            codes = [
                _straight(grid, (grid + torch.rand(grid.shape, generator=self.noise)).floor()) for grid in self.grids
            ]
        coefs = _straight(self.coefs, (self.coefs / self.step).round() * self.step)
        cells = self.network.cells(coefs, codes)
        bits = [self._bits(level, whole) for level in range(len(self.grids))]
        return (cells - self.cells).square().mean(), torch.stack(bits).sum()

    def _bits(self, level: int, whole: list[Tensor]) -> Tensor:
        """Of a grid, between those of the whole numbers around, in proportion."""
        grid, planes = self.grids[level], len(self.grids[level])
        first, near_by, above_by = self.sizes[level, [0, 1, 1][:planes], :, None, None].unbind(1)
        near = nn.functional.pad(whole[level].detach().abs()[:, None], (1, 1, 1, 1))
        scale = first + near_by * torch.log(nn.functional.conv2d(near, self.around)[:, 0] + 0.05)
        if level + 1 < len(self.grids):
            above = whole[level + 1][:planes].detach().abs().repeat_interleave(2, 1).repeat_interleave(2, 2)
            scale = scale + above_by * torch.log(above[:, : grid.shape[1], : grid.shape[2]] + 0.05)
        scale, below = scale.exp().clamp(1e-2, 1e3), grid.detach().floor()
        low, high = _laplace_bits(below, scale), _laplace_bits(below + 1, scale)
        return torch.lerp(low, high, grid - below).sum()

    def field(self) -> Field:
        """As it is stored."""
        whole = [grid.detach().clamp(-LIMIT, LIMIT).round().int().numpy() for grid in self.grids]
        return Field((self.coefs.detach() / self.step).round().int()[0].numpy(), self.step, whole)


def _pyramid(image: Tensor, network: Network) -> list[Tensor]:
    """Grids to start from: what each adds to the next coarser one, where their sum is the image."""
    grey = image - 0.5
    if len(image) == 3:
        grey = torch.linalg.solve(torch.tensor(COLOURS), grey.flatten(1)).view_as(image)
    shapes, grids = network.grids(), []
    for level, ((planes, *size), gain) in enumerate(zip(shapes, network.gains(), strict=True)):
        here = nn.functional.interpolate(grey[None], size, mode="area")
        if level + 1 < len(shapes):
            coarser = nn.functional.interpolate(grey[None], shapes[level + 1][1:], mode="area")
            here = here - nn.functional.interpolate(coarser, size, mode="bicubic")
        grids.append(here[0, :planes] * gain)
    return grids


def _straight(x: Tensor, value: Tensor) -> Tensor:
    """A value of x whose gradient passes straight through to it."""
    return x + (value - x).detach()


def _laplace_bits(x: Tensor, scale: Tensor) -> Tensor:
    """−log2 of what a Laplace distribution gives [x − ½, x + ½]."""
    size = x.abs()
    near, far = torch.exp(-(size - 0.5).abs() / scale), torch.exp(-(size + 0.5) / scale)
    share = torch.where(size < 0.5, 1 - 0.5 * (near + far), 0.5 * (near - far))
    return -torch.log2(share.clamp_min(2.0**-16))


def fitted(
    image: Tensor,
    codec: FieldCodec,
    *,
    bits: int | None = None,
    psnr: float = 0.0,
    steps: int = STEPS,
    watch: Watch = lambda done: None,
) -> tuple[Field, list[bytes]]:
    """Train a field on an image; returns it and its streams. The price of a bit moves until they take `bits`, or the image is as
    good as `psnr`.

    Args:
        image: float32 [channels, height, width], 0 to 1.
        codec: its settings but the sizes.
        bits: that the streams may take.
        psnr: in dB, of the decoded image, where no bits are given.
        steps: of Adam; some more follow where the aim is not met by then.
        watch: called with the steps done since the last call.

    Raises:
        ModelError: the aim cannot be met.
    """
    fit = _Fit(image, codec)
    rates = [(fit.grids.parameters(), 0.1), ([fit.coefs], 0.01), ([fit.sizes], 0.01)]
    optimiser = torch.optim.Adam([{"params": list(some), "lr": rate} for some, rate in rates], betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / steps)) if step < steps else 0.1
    )
    nearest = int(BY_CHANCE * steps)  # the step from which numbers are rounded so
    checks = {*range(steps // 4, 2 * steps, CHECKED), steps}
    price, bias = math.log(FIRST_PRICE), 0.0  # of a bit a pixel in squared error; what expectations were short by
    best: tuple[Field, list[bytes]] | None = None
    for step in range(2 * steps):
        error, expected = fit.train(step < nearest)()
        past = _past(bits, psnr, expected.item(), -10 * math.log10(error.item()))
        if step in checks:
            field = fit.field()
            streams = packed(field)
            found = _past(bits, psnr, 8 * sum(map(len, streams)), _psnr(image, rendered(fit.network, field)))
            if step >= steps and (found >= 0 if bits is None else found <= 0):
                best = field, streams
            if best is not None and (step >= 1.2 * steps or abs(found) < CLOSE):
                return best
            bias = found - past
        if step >= steps // 4:  # before, most bits are still those of the start
            push = past + bias + (CLOSE / 2 if bits is not None else -CLOSE / 2)
            if step >= steps:  # what is left to mend is small, and must move all the same
                push = math.copysign(max(abs(push), 0.3), push)
            price += REACTION * max(-1.0, min(1.0, push))
        loss = error + math.exp(price) * expected / image[0].numel()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step < steps:
            watch(1)
    if best is not None:
        return best
    aim, more = (f"{bits // 8:,} bytes", "more") if bits is not None else (f"{psnr} dB", "less")
    raise ModelError(f"the image cannot be brought to {aim}; ask for {more}, or allow more steps")


def _past(bits: int | None, psnr: float, spent: float, good: float) -> float:
    """How far an aim is passed: the logarithm of bits spent over those to spend, or half of the decibels to spare."""
    return math.log(spent / bits) if bits is not None else (good - psnr) / 2


def compress(
    image: str | Path | Tensor,
    output: str | Path,
    *,
    size: int | None = None,
    psnr: float | None = None,
    steps: int = STEPS,
    seed: int = 0,
    force: bool = False,
    watch: Watch = lambda done: None,
) -> Report:
    """Fit a neural field to an image and write it as a seedpack checkpoint of one tensor, "image".

    Args:
        image: a file that Pillow reads, or uint8 [height, width, channels] of 1 or 3 channels.
        output: the file.
        size: bytes that the file may take, header and all.
        psnr: of the decoded image in dB, instead of a size.
        steps: of training.
        seed: of the network's bases.
        force: replace an existing output.
        watch: called with the steps done since the last call.

    Raises:
        ModelError: the image cannot be read or has transparency, or the aim cannot be met.
        CodecError: it is too large.
        OutputError: the output exists or cannot be written.
    """
    started = time.perf_counter()
    if (size is None) == (psnr is None):
        raise ModelError("give either a size or a psnr")
    if psnr is not None and not 10 <= psnr <= 60:
        raise ModelError(f"psnr must be from 10 to 60 dB, got {psnr}")
    if type(steps) is not int or steps < 1:
        raise ModelError(f"steps must be a whole number from 1, got {steps!r}")
    pixels, output = _usable(image if isinstance(image, Tensor) else read(image)), Path(output)
    height, width, channels = pixels.shape
    fine = size is None or 8 * size > FINE * height * width
    codec = FieldCodec(channels=channels, finest=0 if fine else 1, seed=seed, sizes=(0,) * PARTS)
    network = codec.network((height, width * channels))
    empty = file_bytes([_planned(codec, pixels)], {}, WRITER) + HEADROOM
    if size is not None and size <= empty:
        raise ModelError(f"a file of {size:,} bytes is too small: its header alone takes {empty:,}; ask for more")
    with staged(output, force=force) as partial:
        chosen = pixels.permute(2, 0, 1).float() / 255
        bits = None if size is None else 8 * (size - empty)
        field, streams = fitted(chosen, codec, bits=bits, psnr=psnr or 0.0, steps=steps, watch=watch)
        codec = dataclasses.replace(codec, sizes=tuple(map(len, streams)))
        planned = _planned(codec, pixels)
        with CheckpointWriter(partial, [planned], {}, WRITER) as writer:
            writer.write(
                NAME,
                {part: (*planned.parts[part], stream) for part, stream in zip(planned.parts, streams, strict=True)},
            )
        written = partial.stat().st_size
    decoded = rendered(network, field)
    return Report(
        output, written, 8 * written / (height * width), _psnr(chosen, decoded), time.perf_counter() - started
    )


def decompress(path: str | Path, *, fraction: float | None = None) -> Tensor:
    """The image of a checkpoint that `compress` wrote, uint8 [height, width, channels].

    Args:
        path: the file, which may be cut off behind a level where a fraction is given.
        fraction: use no more than this share of its levels: 0.25 gives a blurred image from the file's beginning.

    Raises:
        ModelError: the checkpoint holds no image.
        FormatError, CodecError: it is damaged.
    """
    with Checkpoint(path, fraction=fraction) as checkpoint:
        entry = checkpoint.manifest.tensors.get(NAME)
        if entry is None or checkpoint.manifest.codec_of(NAME).id != FieldCodec.id:
            raise ModelError(f"{path}: holds no image; seedpack load reads other checkpoints")
        return stored_dense(checkpoint, NAME)


def read(path: str | Path) -> Tensor:
    """An image file as uint8 [height, width, channels], grey or RGB, turned as its EXIF data say.

    Raises:
        ModelError: Pillow cannot read it, or it has transparency or more than 8 bits a channel.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ModelError("image files are read by Pillow; pip install seedpack[image]") from None
    try:
        with Image.open(path) as opened:
            if "A" in opened.getbands() or "transparency" in opened.info:
                raise ModelError(f"{path}: has transparency, which would be lost; flatten it first")
            if opened.mode[0] in "IF":
                raise ModelError(f"{path}: has more than 8 bits a channel ({opened.mode}); convert it first")
            upright = ImageOps.exif_transpose(opened)
            grey = opened.mode in ("1", "L")
            pixels = np.array(upright.convert("L" if grey else "RGB"))
            return torch.from_numpy(pixels).reshape(upright.height, upright.width, -1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ModelError(f"{path}: is no image that can be read ({first_line(error)})") from None


def write(image: Tensor, path: str | Path, *, force: bool = False) -> None:
    """Write uint8 [height, width, 1 or 3] in the format that the name's end says, as .png.

    Raises:
        ModelError: Pillow knows no such format.
        OutputError: the output exists or cannot be written.
    """
    from PIL import Image

    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise ModelError(f"{path}: name an image by its format, as .png")
    pixels = _usable(image).numpy()
    with staged(Path(path), force=force) as partial, partial.open("wb") as file:
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, kind)


def _usable(image: Tensor) -> Tensor:
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ModelError(
            f"an image is uint8 [height, width, 1 or 3], got {str(image.dtype).removeprefix('torch.')} {list(image.shape)}"
        )
    return image.cpu()


def _planned(codec: FieldCodec, image: Tensor) -> PlannedTensor:
    shape = tuple(image.shape)
    return PlannedTensor(NAME, codec.spec(), "U8", shape, codec.parts(matrix_shape(shape)))


def _psnr(image: Tensor, pixels: Tensor) -> float:
    """Of an image 0 to 1 and pixels 0 … 255, in dB; of equal ones that of a quarter of a step."""
    return -10 * math.log10(max(float((pixels / 255 - image).square().mean()), (0.25 / 255) ** 2))
