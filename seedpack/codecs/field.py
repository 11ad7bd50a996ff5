"""An image as a neural field: a pyramid of grids of whole numbers, and a small network of pseudorandom bases that turns them into
pixels."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from seedpack.codecs.base import Codec, Parts, Progress, Shape, require_whole
from seedpack.codecs.derived import derived
from seedpack.errors import CodecError
from seedpack.fields import coding
from seedpack.fields.network import Network
from seedpack.formats import PartSpec
from seedpack.kernels.dispatch import Backend

HEAD = struct.Struct("<fB")  # behind the tables: step and distribution of the coefficients
PARTS = 4
MAX_SIDE, MAX_PIXELS = 1 << 15, 1 << 26
MAX_STEP = 64.0


@dataclass(frozen=True)
class Field:
    """What an image is made of.

    Attributes:
        coefs: codes of the network's coefficients, int32 [count].
        step: what they are multiplied by, float32.
        grids: finest first, int32 [planes, h, w] each; missing finer ones are None.
    """

    coefs: coding.Ints
    step: float
    grids: list[coding.Ints | None]


@dataclass(frozen=True)
class FieldCodec(Codec):
    """An image [height, width, channels] of bytes as a neural field. Parts, each of uint8 [bytes, 1, 1]:

    - weight: the tables of the coder, the step of the network's coefficients and their distribution, then one stream of
      Constriction's range coder (words of 32 bits, little-endian): the coefficients and all grids but the finest three.
    - more_1, more_2, more_3: the next finer grid each; a prefix of the file gives a blurred image.

    `seedpack.image.compress` makes it; of a weight that is given it makes nothing.

    Attributes:
        channels: 1 or 3.
        finest: the finest grid: 1 has a number for two by two pixels, 0 for each.
        hidden: width of the network.
        count: coefficients of the network.
        seed: of its bases.
        sizes: bytes of each part.
    """

    id: ClassVar[str] = "field"
    version: ClassVar[int] = 0
    channels: int = 3
    finest: int = 1
    hidden: int = 8
    count: int = 256
    seed: int = 0
    sizes: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.channels not in (1, 3) or type(self.channels) is not int:
            raise CodecError(f"{self.id}: channels must be 1 or 3, got {self.channels!r}")
        require_whole(self.id, "finest", self.finest, 0, 1)
        require_whole(self.id, "hidden", self.hidden, 1, 256)
        require_whole(self.id, "count", self.count, 1, 1 << 20)
        require_whole(self.id, "seed", self.seed, 0, 2**63 - 1)
        if not isinstance(self.sizes, (list, tuple)) or len(self.sizes) != PARTS:
            raise CodecError(f"{self.id}: sizes must be {PARTS} numbers of bytes, got {self.sizes!r}")
        for size in self.sizes:
            require_whole(self.id, "sizes", size, 0, 2**31)
        object.__setattr__(self, "sizes", tuple(self.sizes))

    def network(self, shape: Shape) -> Network:
        """Of an image whose matrix is [height, width · channels]."""
        if shape[1] % self.channels:
            raise CodecError(f"{self.id}: a row of {shape[1]} numbers is not of {self.channels} channels")
        if max(shape[0], shape[1] // self.channels) > MAX_SIDE or math.prod(shape) // self.channels > MAX_PIXELS:
            raise CodecError(
                f"{self.id}: images have up to {MAX_SIDE:,} pixels a side and {MAX_PIXELS:,} in all, this one "
                f"{shape[0]:,} × {shape[1] // self.channels:,}"
            )
        return Network(shape[0], shape[1] // self.channels, self.channels, self.finest, self.hidden, self.seed)

    def parts(self, shape: Shape) -> dict[str, PartSpec]:
        """Streams of the sizes that the settings give."""
        return {f"more_{i}" if i else "weight": ("U8", (size, 1, 1)) for i, size in enumerate(self.sizes)}

    def encode(
        self, weight: Tensor, importance: Tensor | None = None, *, progress: Progress | None = None, backend: Backend = "auto"
    ) -> Parts:  # fmt: skip
        """Refused: how many bytes an image takes is known when it is fitted."""
        raise CodecError("field: for images; make one with seedpack.image.compress or `seedpack image compress`")

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype, backend: Backend = "auto") -> Tensor:
        """0 … 255, whole numbers, in any dtype; without the last parts a blurred image."""
        pixels = rendered(self.network(shape), self.field(parts, shape), parts["weight"].device)
        return pixels.permute(1, 2, 0).reshape(shape).to(dtype)

    def check(self, parts: Mapping[str, Tensor], shape: Shape) -> None:
        """Beside the parts' form: the streams can be decoded."""
        super().check(parts, shape)
        self.network(shape)
        if parts["weight"].device.type != "meta":
            self.field(dict(parts), shape)

    def field(self, parts: Parts, shape: Shape) -> Field:
        """What the parts hold; decoded once for a check and what follows."""
        places = tuple((name, part.data_ptr()) for name, part in parts.items())
        return derived(parts["weight"], (self, shape, places), lambda: self._field(parts, shape))

    def _field(self, parts: Parts, shape: Shape) -> Field:
        network = self.network(shape)
        streams = [
            part.flatten().cpu().numpy().tobytes()
            for part in (parts[name] for name in self.parts(shape) if name in parts)
        ]
        levels = len(network.grids())
        tables = coding.Sizes.nbytes(levels)
        head, streams[0] = streams[0][: tables + HEAD.size], streams[0][tables + HEAD.size :]
        if len(head) < tables + HEAD.size or any(len(stream) % coding.WORD_BYTES for stream in streams):
            raise CodecError(f"{self.id}: a stream has no whole number of words; the file is corrupt")
        sizes, (step, size) = coding.Sizes.from_bytes(head[:tables], levels), HEAD.unpack(head[tables:])
        if not 0 < step <= MAX_STEP:
            raise CodecError(f"{self.id}: the step of the coefficients is {step}; the file is corrupt")
        grids: list[Any] = [None] * (levels + 1)
        try:
            decoder = coding.decoder(streams[0])
            coefs = coding.read_codes(decoder, size % coding.SIZES, self.count)
            for level, form in reversed(list(enumerate(network.grids()))):
                if level < PARTS - 1:
                    if PARTS - 1 - level >= len(streams):
                        break
                    decoder = coding.decoder(streams[PARTS - 1 - level])
                grids[level] = coding.read_grid(decoder, sizes, level, form, grids[level + 1])
        except AssertionError as error:  # what the coder raises for data that no encoder wrote
            raise CodecError(f"{self.id}: a stream is corrupt ({error})") from None
        return Field(coefs, step, grids[:-1])


def packed(field: Field) -> list[bytes]:
    """The streams of a whole field, in the order of the parts."""
    grids: list[Any] = [*field.grids, None]
    sizes, size = coding.fitted_sizes(grids[:-1]), coding.best_size(field.coefs)
    head = sizes.to_bytes() + HEAD.pack(field.step, size)
    encoder, streams = coding.encoder(), []
    coding.write_codes(encoder, size, field.coefs)
    for level in reversed(range(len(field.grids))):
        if level < PARTS - 1:
            streams.append(coding.coded(encoder))
            encoder = coding.encoder()
        coding.write_grid(encoder, sizes, level, grids[level], grids[level + 1])
    streams.append(coding.coded(encoder))
    return [head + streams[0], *streams[1:]]


def rendered(network: Network, field: Field, device: torch.device | None = None) -> Tensor:
    """Pixels [channels, height, width], whole numbers 0 … 255."""
    grids = [
        torch.zeros(shape, device=device) if grid is None else torch.from_numpy(grid).to(device, torch.float32)
        for shape, grid in zip(network.grids(), field.grids, strict=True)
    ]
    coefs = torch.from_numpy(field.coefs).to(device, torch.float32)[None] * field.step
    with torch.no_grad():
        return (network.render(coefs, grids) * 255).round().clamp(0, 255)
