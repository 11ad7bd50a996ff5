"""Read and write image files with Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seedpack.errors import ModelError, first_line
from seedpack.formats import staged


def read(path: str | Path) -> Tensor:
    """Read an image file as uint8 [height, width, channels], grey or RGB, turned as its EXIF data say.

    Raises:
        ModelError: Pillow cannot read it, or it has transparency or more than 8 bits per channel (Pillow reads colours of 16
            bits as 8).
    """
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as opened:
            if "A" in opened.getbands() or "transparency" in opened.info:
                raise ModelError(f"{path}: has transparency, which would be lost; flatten it first")
            if opened.mode[0] in "IF":
                raise ModelError(f"{path}: has more than 8 bits per channel ({opened.mode}); convert it first")
            upright = pillow.ImageOps.exif_transpose(opened)
            grey = opened.mode in ("1", "L")
            pixels = np.array(upright.convert("L" if grey else "RGB"))
            return torch.from_numpy(pixels).reshape(upright.height, upright.width, -1)
    except (OSError, ValueError, SyntaxError, pillow.Image.DecompressionBombError) as error:
        raise ModelError(f"{path}: is not an image that Pillow reads ({first_line(error)})") from None


def write(image: Tensor, path: str | Path, *, force: bool = False) -> None:
    """Write uint8 [height, width, 1 or 3] in the format that the name's end says, as in photo.png.

    Raises:
        ModelError: Pillow knows no such format.
        OutputError: the output exists or cannot be written.
    """
    pillow, kind = _pillow(), format_of(path)
    pixels = usable(image).numpy()
    with staged(Path(path), force=force) as partial, partial.open("wb") as file:
        pillow.Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, kind)


def format_of(path: str | Path) -> str:
    """Return Pillow's name of the format that a file's name ends with.

    Raises:
        ModelError: Pillow writes no such format.
    """
    pillow = _pillow()
    kind = pillow.Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in pillow.Image.SAVE:
        raise ModelError(f"{path}: end the name with an image format, as in photo.png")
    return str(kind)


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise ModelError("image files are read and written by Pillow; pip install pillow") from None
    return PIL


def usable(image: Tensor) -> Tensor:
    """Return an image on the CPU.

    Raises:
        ModelError: it is not uint8 [height, width, 1 or 3].
    """
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ModelError(
            f"an image is uint8 [height, width, 1 or 3], got {str(image.dtype).removeprefix('torch.')} {list(image.shape)}"
        )
    return image.cpu()
