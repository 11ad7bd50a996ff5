"""Wavelet bands of an image: the biorthogonal 9/7 pair by lifting (Daubechies and Sweldens 1998), near to orthonormal.

Colours are transformed by an orthonormal matrix. Bands of odd sizes are rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

LEVELS = 6
LIFTS = (-1.586134342059924, -0.052980118572961, 0.882911075530934, 0.443506852043971)
SCALE = 1.149604398860241
COLOURS = (
    (1.0, 1.0, 1.0),
    (1.0, 0.0, -1.0),
    (1.0, -2.0, 1.0),
)  # brightness and two differences, of R, G, B; each over its norm


class Band(NamedTuple):
    """Numbers of one colour at one level.

    Attributes:
        level: 0 for the finest details, LEVELS for the low pass.
        colour: 0 for brightness.
        shape: [3, h, w] of details across, down and in both directions, or [1, h, w] of the low pass.
    """

    level: int
    colour: int
    shape: tuple[int, int, int]


def bands(channels: int, height: int, width: int) -> list[Band]:
    """Return the bands of an image, coarse ones first; differences of colours have no finest details."""
    return [
        Band(level, colour, (1 if level == LEVELS else 3, *_halved(height, width, min(level + 1, LEVELS))))
        for level in reversed(range(LEVELS + 1))
        for colour in range(channels if level else 1)
    ]


def with_context(bands: list[Band], numbers: Sequence[T]) -> Iterator[tuple[Band, T | None, T | None]]:
    """Yield each band with the numbers of the same colour's next coarser details, and of the same level's colour before.

    `numbers` may grow meanwhile.
    """
    places = {(band.level, band.colour): place for place, band in enumerate(bands)}
    for band in bands:
        parent = numbers[places[band.level + 1, band.colour]] if band.level + 1 < LEVELS else None
        before = numbers[places[band.level, band.colour - 1]] if band.colour else None
        yield band, parent, before


def analysed(image: Tensor) -> list[Tensor]:
    """Return the numbers of an image [channels, height, width], in the order of its `bands`."""
    lowpass = (_colours(image) @ image.flatten(1)).view_as(image)
    numbers: list[Tensor] = []
    for level in range(LEVELS):
        left, right = _split(lowpass)
        (lowpass, down), (across, both) = (_split(half.mT) for half in (left, right))
        lowpass, *details = (part.mT for part in (lowpass, across, down, both))
        by_colour = torch.stack(details, 1)
        numbers = [*(by_colour[: None if level else 1]), *numbers]
    return [*lowpass[:, None], *numbers]


def synthesised(numbers: list[Tensor], channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the image [channels, height, width] of its bands' numbers, and its colours at half the resolution.

    The colours [channels, height / 2, width / 2] are twice as large as at the full resolution.
    """
    lowpass, numbers = torch.cat(numbers[:channels]), numbers[channels:]
    for level in reversed(range(1, LEVELS)):
        lowpass = _joined(lowpass, torch.stack(numbers[:channels], 1), _halved(height, width, level))
        numbers = numbers[channels:]
    finest = torch.stack((numbers[0], *[torch.zeros_like(numbers[0])] * (channels - 1)), 1)
    whole = _joined(lowpass, finest, (height, width))
    return (_colours(whole).T @ whole.flatten(1)).view_as(whole), lowpass


def _joined(low: Tensor, details: Tensor, size: tuple[int, int]) -> Tensor:
    """Join a low pass [c, h, w] and details [3, c, h, w] into the next larger low pass."""
    across, down, both = details
    upright = (_merged(low.mT, down.mT, size[0]).mT, _merged(across.mT, both.mT, size[0]).mT)
    return _merged(*upright, size[1])


def _colours(like: Tensor) -> Tensor:
    """Return the orthonormal matrix of colours, [channels, channels]."""
    rows = torch.tensor(COLOURS if len(like) == 3 else ((1.0,),), dtype=like.dtype, device=like.device)
    return nn.functional.normalize(rows)


def _halved(height: int, width: int, times: int) -> tuple[int, int]:
    return -(-height >> times), -(-width >> times)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows into low and high pass."""
    if x.shape[-1] % 2:
        x = torch.cat((x, x[..., -1:]), -1)
    even, odd = x[..., ::2], x[..., 1::2]
    for i, lift in enumerate(LIFTS):
        even, odd = (even + lift * _with_left(odd), odd) if i % 2 else (even, odd + lift * _with_right(even))
    return even * SCALE, odd / SCALE


def _merged(low: Tensor, high: Tensor, size: int) -> Tensor:
    """Merge low and high pass into rows of so many numbers."""
    even, odd = low / SCALE, high * SCALE
    for i, lift in reversed(list(enumerate(LIFTS))):
        even, odd = (even - lift * _with_left(odd), odd) if i % 2 else (even, odd - lift * _with_right(even))
    return torch.stack((even, odd), -1).flatten(-2)[..., :size]


def _with_right(x: Tensor) -> Tensor:
    """Add to each number the one to its right; the last one twice."""
    return x + torch.cat((x[..., 1:], x[..., -1:]), -1)


def _with_left(x: Tensor) -> Tensor:
    return x + torch.cat((x[..., :1], x[..., :-1]), -1)
