"""An image as a neural field: bands of whole numbers, and a small network of pseudorandom bases that turns them into pixels."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from seedpack.codecs.base import Codec, Parts, Progress, Shape, require_whole
from seedpack.codecs.derived import derived
from seedpack.codecs.importance import ImportanceLike
from seedpack.errors import CodecError
from seedpack.formats import PartSpec
from seedpack.image import coding
from seedpack.image.network import Network
from seedpack.image.wavelet import LEVELS, Band, with_context
from seedpack.kernels.dispatch import Backend

HEAD = struct.Struct("<ffB")  # behind the tables: unit of the bands, step and distribution of the coefficients
PARTS = 4
LOW = 8.0  # units that a number of the low pass stands for: few numbers, each of many pixels, are large
MAX_SIDE, MAX_PIXELS = 1 << 15, 1 << 26
MAX_STEP = 64.0
LEAST_SHARE = 1 - 2.0**-6  # of the least bits of a stream: what rounding of the coder's shares may save


@dataclass(frozen=True)
class Field:
    """An image, decomposed.

    Attributes:
        coefs: codes of the network's coefficients, int32 [count].
        step: their factor, float32.
        unit: the factor of the bands.
        bands: coarse ones first, int32 of the shapes that the network's `bands` give; finer ones may be missing.
    """

    coefs: coding.Ints
    step: float
    unit: float
    bands: list[coding.Ints]


@dataclass(frozen=True)
class FieldCodec(Codec):
    """An image [height, width, channels] of bytes as a neural field. Parts, each of uint8 [bytes, 1, 1]:

    - weight: the tables of the coder, the unit of the bands, the step of the network's coefficients and their distribution,
      then one stream of Constriction's range coder (words of 32 bits, little-endian): the coefficients and the bands of all
      levels but the finest three.
    - more_1, more_2, more_3: the next finer level each; a prefix of the file gives a blurred image.

    `seedpack.image.compress` writes it; it packs no weights.

    Attributes:
        channels: 1 or 3.
        hidden: width of the network.
        count: coefficients of the network.
        seed: of its bases.
        sizes: bytes of each part.
    """

    id: ClassVar[str] = "field"
    version: ClassVar[int] = 0
    summary: ClassVar[str] = "an image as a neural field; written by seedpack image compress"
    nestable: ClassVar[bool] = False
    channels: int = 3
    hidden: int = 8
    count: int = 256
    seed: int = 0
    sizes: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.channels not in (1, 3) or type(self.channels) is not int:
            raise CodecError(f"{self.id}: channels must be 1 or 3, got {self.channels!r}")
        require_whole(self.id, "hidden", self.hidden, 1, 32)
        require_whole(self.id, "count", self.count, 1, 1 << 20)
        require_whole(self.id, "seed", self.seed, 0, 2**63 - 1)
        if not isinstance(self.sizes, (list, tuple)) or len(self.sizes) != PARTS:
            raise CodecError(f"{self.id}: sizes must be {PARTS} numbers of bytes, got {self.sizes!r}")
        for size in self.sizes:
            require_whole(self.id, "sizes", size, 0, 2**31)
        object.__setattr__(self, "sizes", tuple(self.sizes))

    def network(self, shape: Shape) -> Network:
        """Return the network of an image whose matrix is [height, width · channels]."""
        if shape[1] % self.channels:
            raise CodecError(f"{self.id}: a row of {shape[1]} numbers is not of {self.channels} channels")
        if max(shape[0], shape[1] // self.channels) > MAX_SIDE or math.prod(shape) // self.channels > MAX_PIXELS:
            raise CodecError(
                f"{self.id}: images have up to {MAX_SIDE:,} pixels a side and {MAX_PIXELS:,} in all, this one "
                f"{shape[0]:,} × {shape[1] // self.channels:,}"
            )
        return Network(shape[0], shape[1] // self.channels, self.channels, self.hidden, self.seed)

    def parts(self, shape: Shape) -> dict[str, PartSpec]:
        """Return streams of the sizes in the settings."""
        return {f"more_{i}" if i else "weight": ("U8", (size, 1, 1)) for i, size in enumerate(self.sizes)}

    def encode(
        self,
        weight: Tensor,
        importance: ImportanceLike = None,
        *,
        progress: Progress | None = None,
        backend: Backend = "auto",
    ) -> Parts:
        """Refuse to encode: the sizes of the parts are known only once an image is fitted."""
        raise CodecError("field: for images; make one with seedpack.image.compress or `seedpack image compress`")

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype, backend: Backend = "auto") -> Tensor:
        """Return whole numbers 0 … 255 in any dtype; without the last parts a blurred image."""
        pixels = rendered(self.network(shape), self.field(parts, shape), parts["weight"].device)
        return pixels.permute(1, 2, 0).reshape(shape).to(dtype)

    def decoding_cost(self, shape: Shape) -> int:
        """Return what rendering takes: the transform's planes and the network's; or the work of reading the streams too."""
        pixels = math.prod(shape) // self.channels
        return max(pixels * (40 + 20 * self.channels + 2 * self.hidden), pixels * 40 + self.checking_cost(shape))

    def checking_cost(self, shape: Shape) -> int:
        """Return the work of reading the streams: 1.3 microseconds per pixel, 80 per wave of numbers, and 10 milliseconds."""
        waves = sum(coding.wave_count(*band.shape[1:]) for band in self.network(shape).bands())
        return math.prod(shape) // self.channels * 65 + 4000 * waves + 16 * self.count + 500_000

    def check_form(self, parts: Mapping[str, Tensor], shape: Shape) -> None:
        """Check also that the image is not too large, and that no stream is shorter than a blank image's."""
        super().check_form(parts, shape)
        bits = [self.count * coding.least_bits(coding.LIMITS[0]), *[0.0] * (PARTS - 1)]
        for band in self.network(shape).bands():
            bits[_part(band)] += math.prod(band.shape) * coding.least_bits(coding.limit_of(band.level))
        for name, size, stream_bits in zip(self.parts(shape), self.sizes, bits, strict=True):
            words = max(0, int(LEAST_SHARE * stream_bits / (8 * coding.WORD_BYTES)) - 2)
            least = words * coding.WORD_BYTES + (head_bytes(self.channels) if name == "weight" else 0)
            if size < least:
                raise CodecError(
                    f"{self.id}: part {name!r} has {size} bytes, and of a blank image of this size it would have at least "
                    f"{least}; the file is corrupt"
                )

    def check(self, parts: Mapping[str, Tensor], shape: Shape) -> None:
        """Check the parts' form, and that the streams can be decoded."""
        super().check(parts, shape)
        if parts["weight"].device.type != "meta":
            self.field(dict(parts), shape)

    def field(self, parts: Parts, shape: Shape) -> Field:
        """Decode the parts, once for a check and the use that follows."""
        return derived(list(parts.values()), (self, shape, tuple(parts)), lambda: self._field(parts, shape))

    def _field(self, parts: Parts, shape: Shape) -> Field:
        network = self.network(shape)
        streams = [
            part.flatten().cpu().numpy().tobytes()
            for part in (parts[name] for name in self.parts(shape) if name in parts)
        ]
        tables, ahead = coding.Sizes.nbytes(self.channels), head_bytes(self.channels)
        head, streams[0] = streams[0][:ahead], streams[0][ahead:]
        if len(head) < ahead or any(len(stream) % coding.WORD_BYTES for stream in streams):
            raise CodecError(f"{self.id}: a stream has no whole number of words; the file is corrupt")
        sizes = coding.Sizes.from_bytes(head[:tables], self.channels)
        unit, step, size = HEAD.unpack(head[tables:])
        if not (0 < step <= MAX_STEP and 0 < unit <= MAX_STEP):
            raise CodecError(f"{self.id}: the steps are {unit} and {step}; the file is corrupt")
        decoded: list[coding.Ints] = []
        try:
            decoders = [coding.decoder(stream) for stream in streams]
            coefs = coding.read_codes(decoders[0], size % coding.SIZES, self.count)
            for band, parent, before in with_context(network.bands(), decoded):
                if _part(band) >= len(streams):
                    break
                decoded.append(coding.read_band(decoders[_part(band)], sizes, band, parent, before))
        except AssertionError as error:  # raised by the coder for data that no encoder wrote
            raise CodecError(f"{self.id}: a stream is corrupt ({error})") from None
        return Field(coefs, step, unit, decoded)


def _part(band: Band) -> int:
    """Return the stream that a band is in."""
    return max(0, PARTS - 1 - band.level)


def packed(field: Field, sizes: coding.Sizes, bands: list[Band]) -> list[bytes]:
    """Return the streams of a whole field, in the order of the parts."""
    size = coding.best_size(field.coefs)
    encoders = [coding.encoder() for _ in range(PARTS)]
    coding.write_codes(encoders[0], size, field.coefs)
    for numbers, (band, parent, before) in zip(field.bands, with_context(bands, field.bands), strict=True):
        coding.write_band(encoders[_part(band)], sizes, band, numbers, parent, before)
    head = sizes.to_bytes() + HEAD.pack(field.unit, field.step, size)
    first, *others = map(coding.coded, encoders)
    return [head + first, *others]


def head_bytes(channels: int) -> int:
    """Return the count of bytes before the first stream."""
    return coding.Sizes.nbytes(channels) + HEAD.size


def packed_bytes(field: Field, sizes: coding.Sizes, bands: list[Band]) -> int:
    """Estimate the bytes of `packed`, in a fraction of its time."""
    bits = float(coding.costs(coding.LIMITS[0])[coding.best_size(field.coefs), abs(field.coefs)].sum())
    for numbers, (band, parent, before) in zip(field.bands, with_context(bands, field.bands), strict=True):
        which = coding.distribution_of(sizes, band, numbers, parent, before)
        bits += float(coding.costs(coding.limit_of(band.level))[which, abs(numbers)].sum())
    return len(sizes.to_bytes()) + HEAD.size + math.ceil(bits / 8) + PARTS * coding.WORD_BYTES


def unit_of(band: Band) -> float:
    """Return the value of a band's step in the field's unit."""
    return LOW if band.level == LEVELS else 1.0


def rendered(network: Network, field: Field, device: torch.device | None = None) -> Tensor:
    """Render pixels [channels, height, width], whole numbers 0 … 255."""
    bands = network.bands()
    values = [torch.zeros(band.shape, dtype=torch.float32, device=device) for band in bands]
    for place, (band, numbers) in enumerate(zip(bands, field.bands, strict=False)):
        values[place] = torch.from_numpy(numbers).to(device, torch.float32) * (field.unit * unit_of(band))
    coefs = torch.from_numpy(field.coefs).to(device, torch.float32)[None] * field.step
    with torch.no_grad(), torch.autocast(coefs.device.type, enabled=False):
        return (network.render(coefs, values) * 255).round().clamp(0, 255)
