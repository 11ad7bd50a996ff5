"""Parts and files that ask for much, made by the repository's own writer: few bytes that stand for many."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seedpack.codecs.base import Codec, Shape
from seedpack.codecs.mask import MaskCodec, kept_of
from seedpack.dtypes import TORCH_DTYPES, to_bytes
from seedpack.formats import CheckpointWriter, PlannedTensor, View
from seedpack.image import coding
from seedpack.image.codec import PARTS, Field, FieldCodec, packed

Parts = dict[str, Tensor]


def parts_of(codec: Codec, shape: Shape) -> Parts:
    """Return parts that a codec accepts: seeds and streams of ones, floats of one bit pattern in any width."""
    if isinstance(codec, MaskCodec):
        mask = torch.zeros(shape, dtype=torch.bool).flatten()
        mask[torch.randperm(mask.numel())[: kept_of(codec.kept, mask.numel())]] = True
        return codec.stored(mask.view(shape), 0.5)
    fill = {"U8": 1, "I8": 0, "I16": 0x2C00, "I32": 0x3D800000}
    return {
        name: torch.full(part, fill.get(dtype, 0), dtype=TORCH_DTYPES[dtype])
        for name, (dtype, part) in codec.parts(shape).items()
    }


def blank_image(height: int, width: int, channels: int = 3) -> tuple[FieldCodec, Shape, Parts]:
    """Return the codec of a blank image, its matrix and its parts: as few bytes as an image of this size can take."""
    codec, shape = FieldCodec(channels=channels, sizes=(0,) * PARTS), (height, width * channels)
    bands = codec.network(shape).bands()
    sizes = coding.Sizes.from_bytes(bytes(coding.Sizes.nbytes(channels)), channels)
    numbers = [np.zeros(band.shape, np.int32) for band in bands]
    streams = packed(Field(np.zeros(codec.count, np.int32), 1.0, 1.0, numbers), sizes, bands)
    codec = dataclasses.replace(codec, sizes=tuple(map(len, streams)))
    parts = {
        name: torch.from_numpy(np.frombuffer(stream, np.uint8).copy())[:, None, None]
        for name, stream in zip(codec.parts(shape), streams, strict=True)
    }
    return codec, shape, parts


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[Codec, Shape, Parts]],
    *,
    dtype: str = "F32",
    transposed: bool = False,
    shared: Mapping[str, str] = {},
    views: Mapping[str, View] = {},
) -> Path:
    """Write tensors of codecs, dense shapes and parts, which need not fit each other."""
    planned = {
        name: PlannedTensor(
            name, codec.spec(), dtype, shape, {k: to_bytes(v)[:2] for k, v in parts.items()}, transposed
        )
        for name, (codec, shape, parts) in tensors.items()
    }
    with CheckpointWriter(path, list(planned.values()), shared, "test", views=views) as writer:
        for name, (_, _, parts) in tensors.items():
            writer.write(name, {part: to_bytes(value) for part, value in parts.items()})
    return path


def write_blank_image(path: Path, height: int, width: int, channels: int = 3) -> Path:
    """Write a blank image."""
    codec, _, parts = blank_image(height, width, channels)
    return write_tensors(path, {"image": (codec, (height, width, channels), parts)}, dtype="U8")
