"""Images as seedpack checkpoints."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedpack._version import WRITER
from seedpack.codecs.base import matrix_shape
from seedpack.codecs.range_coder import stream
from seedpack.errors import ModelError
from seedpack.formats import Checkpoint, CheckpointWriter, PlannedTensor, staged
from seedpack.formats.writer import file_bytes
from seedpack.image.codec import PARTS, FieldCodec, rendered
from seedpack.image.files import read, usable
from seedpack.image.fit import STEPS, Watch, fitted, psnr_of
from seedpack.loader.dense import stored_dense

NAME = "image"


@dataclass(frozen=True)
class Report:
    """The result of `compress`.

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
        """Return the report for machines."""
        return {**self.__dict__, "path": str(self.path)}


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
    if psnr is not None and not 10 <= psnr <= 50:
        raise ModelError(f"psnr must be from 10 to 50 dB, got {psnr}")
    if type(steps) is not int or steps < 1:
        raise ModelError(f"steps must be a whole number from 1, got {steps!r}")
    stream("field")  # before the training, not after it
    pixels, output = usable(image if isinstance(image, Tensor) else read(image)), Path(output)
    height, width, channels = pixels.shape
    codec = FieldCodec(channels=channels, seed=seed, sizes=(0,) * PARTS)
    network = codec.network((height, width * channels))
    empty = 0
    if size is not None:  # a header with streams of this size, which has no fewer digits
        most = dataclasses.replace(codec, sizes=(size,) * PARTS)
        empty = file_bytes([_planned(most, pixels)], {}, WRITER) - PARTS * size
    if size is not None and size <= empty:
        raise ModelError(f"a file of {size:,} bytes is too small: its header alone takes {empty:,}; ask for more")
    with staged(output, force=force) as partial:
        target = pixels.permute(2, 0, 1).float() / 255
        bits = None if size is None else 8 * (size - empty)
        field, streams = fitted(target, codec, bits=bits, psnr=psnr or 0.0, steps=steps, watch=watch)
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
        output, written, 8 * written / (height * width), psnr_of(target, decoded), time.perf_counter() - started
    )


def decompress(path: str | Path, *, fraction: float | None = None, max_bytes: int | None = None) -> Tensor:
    """Decode the image of a checkpoint that `compress` wrote, uint8 [height, width, channels].

    Args:
        path: the file, which may be cut off behind a level where a fraction is given.
        fraction: use no more than this share of its levels: 0.25 gives a blurred image from the file's beginning.
        max_bytes: that decoding may take, of files that you trust; by default 1 GB, or 1,024 times the file if that is more,
            and no more than is free.

    Raises:
        LimitError: it takes more than `max_bytes`.
        ModelError: the checkpoint holds no image.
        FormatError, CodecError: it is damaged.
    """
    with Checkpoint(path, fraction=fraction, max_bytes=max_bytes) as checkpoint:
        entry = checkpoint.manifest.tensors.get(NAME)
        if entry is None or checkpoint.manifest.codec_of(NAME).id != FieldCodec.id:
            raise ModelError(f"{path}: holds no image; seedpack load reads other checkpoints")
        image = stored_dense(checkpoint, NAME)
    if image.dtype != torch.uint8 or image.dim() != 3:
        raise ModelError(f"{path}: holds no image, but {str(image.dtype).removeprefix('torch.')} {list(image.shape)}")
    return image


def _planned(codec: FieldCodec, image: Tensor) -> PlannedTensor:
    shape = tuple(image.shape)
    return PlannedTensor(NAME, codec.spec(), "U8", shape, codec.parts(matrix_shape(shape)))
