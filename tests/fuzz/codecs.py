"""Targets: each codec's settings, parts and streams."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from seedpack.codecs.base import Codec
from seedpack.codecs.mask import MaskCodec
from seedpack.codecs.registry import codec_from_spec
from seedpack.dtypes import to_tensor
from seedpack.errors import SeedpackError
from seedpack.formats import Manifest, Part
from seedpack.formats.header import nbytes
from seedpack.formats.manifest import manifest_from_json
from seedpack.image import coding
from seedpack.loader.dense import stored_codec, stored_dense
from seedpack.loader.layers import codec_matrix
from tests.fuzz.draws import Draws, edited
from tests.fuzz.sound import MOST, Sound, sealed, sound
from tests.helpers.bombs import blank_image

LARGEST = 1 << 16  # bytes of parts that are made up


@dataclass
class InMemory:
    """A checkpoint of one tensor without a file: what `loader.dense` asks one for."""

    manifest: Manifest
    stored: dict[str, Part]
    path: Path = Path("x")
    fraction: float | None = None
    max_bytes: int = MOST

    def parts(self, name: str, *, check: bool | None = None) -> dict[str, Part]:
        return self.stored


def codec(id: str, data: bytes) -> None:
    """Decode a tensor, all of it and two rows: settings and shapes changed, parts as stored or of the form that these ask for."""
    draws = Draws(data)
    file = draws.pick(sound(id))
    changes = edited({key: file.manifest[key] for key in ("codecs", "tensors")}, draws)
    manifest = manifest_from_json(sealed({**file.manifest, **changes}), "x")
    names = sorted((name for name in manifest.tensors if name in file.header), key=manifest.is_packed, reverse=True)
    if not names:
        return
    name = draws.pick(names)
    parts = _own_parts(file, manifest, name)
    if draws.below(2):
        parts = _made_up(manifest, name, draws) or parts
    for part in parts.values():
        for _ in range(draws.below(4) if len(part.data) else 0):
            part.data[draws.below(len(part.data))] = draws.below(256)
    checkpoint = cast(Any, InMemory(manifest, parts))
    stored_dense(checkpoint, name)
    made, matrix = stored_codec(checkpoint, name)
    if len(matrix) == 2:
        tensors = {part: to_tensor(stored) for part, stored in parts.items()}
        made.decode_rows(tensors, torch.tensor([matrix[0] - 1, 0]), matrix, torch.float32, "reference")


def _own_parts(file: Sound, manifest: Manifest, name: str) -> dict[str, Part]:
    """Return the parts as the file has them."""
    found = {part: (key, file.header[key]) for part, key in manifest.part_keys(name).items() if key in file.header}
    return {
        part: Part(info["dtype"], tuple(info["shape"]), memoryview(bytearray(file.data(key))))
        for part, (key, info) in found.items()
    }


def _made_up(manifest: Manifest, name: str, draws: Draws) -> dict[str, Part] | None:
    """Return parts of the form that settings and shape ask for, of bytes that repeat; None where they cannot be had."""
    entry = manifest.tensors[name]
    try:
        made: Codec = codec_from_spec(manifest.codec_of(name))
        forms = made.parts(codec_matrix(entry.shape, entry.transposed) if made.id != "raw" else entry.shape)
    except (SeedpackError, TypeError, ArithmeticError):  # which `stored_codec` says of the tensor
        return None
    sizes = {part: nbytes(*form) for part, form in forms.items()}
    if sum(sizes.values()) > LARGEST:
        return None
    fill = draws.take(1 + draws.below(16))
    return {
        part: Part(
            dtype, tuple(shape), memoryview(bytearray((fill * math.ceil(sizes[part] / len(fill)))[: sizes[part]]))
        )
        for part, (dtype, shape) in forms.items()
    }


def coder(data: bytes) -> None:
    """Decode words that no encoder may have written, by the coder of masks and by that of images."""
    draws = Draws(data)
    mask, shape = MaskCodec((1 + draws.below(255)) / 256), (1 + draws.below(9), 1 + draws.below(200))
    _, size = mask.parts(shape)["weight"]
    words = torch.frombuffer(bytearray(draws.take(size[0])), dtype=torch.uint8).view(size)
    image, matrix, _ = blank_image(1 + draws.below(20), 1 + draws.below(20), draws.pick((3, 1)))
    tables = coding.Sizes.from_bytes(draws.take(coding.Sizes.nbytes(image.channels)), image.channels)
    try:
        mask.mask({"weight": words}, shape)
        stream = draws.rest()
        decoder = coding.decoder(stream[: len(stream) // 4 * 4])
        coding.read_codes(decoder, draws.below(coding.SIZES), 9)
        for band in image.network(matrix).bands():
            coding.read_band(decoder, tables, band, None, None)
    except AssertionError:  # the coder's own, which codecs catch
        pass
