"""Bands of whole numbers as bytes: a range coder whose probabilities follow from the numbers coded before.

The expected size of a number is a weighted sum of the magnitudes around it that are coded already: of its neighbours, of the
coarser band and of the colour before (as in Wu's ECECOW, 1997); a geometric distribution of that size codes it. All of it is
whole numbers, so that every machine decodes the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seedpack.codecs.range_coder import stream
from seedpack.image.wavelet import LEVELS, Band

Ints = NDArray[np.int32]
SIZES = 84  # distributions, from the narrowest to the widest
LIMITS = (127, 255, 1023)  # of magnitudes, by level; the last one for all others
UNIT = 128  # of weights and sizes
NEAR = (
    ((0, -1),),
    ((-1, 0),),
    ((-1, -1), (-1, 1)),
    ((0, -2),),
    ((-2, 0),),
    ((-2, -1), (-2, 1)),
)  # rows, columns, by weight
WEIGHTS = len(NEAR) + 3  # and the number in the coarser band, the eight around that one, and that of the colour before
DIRECTIONS = 4  # three of details, and the low pass
WORD_BYTES = 4


@dataclass(frozen=True)
class Sizes:
    """Weights and least sizes, from which a number's distribution follows.

    Attributes:
        weights: of the magnitudes around, int32 [kinds of colours, DIRECTIONS, WEIGHTS], 0 to 255, in units of 1 / UNIT. The first kind
            is brightness, the second one all differences.
        least: by level, the distribution where all around is 0, int32 [LEVELS + 1, kinds of colours].
    """

    weights: Ints
    least: Ints

    def to_bytes(self) -> bytes:
        """Return both as uint8."""
        return np.concatenate((self.weights.flatten(), self.least.flatten())).astype(np.uint8).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, channels: int) -> Sizes:
        """Read both from `nbytes(channels)` bytes."""
        kinds, values = min(channels, 2), np.frombuffer(data, np.uint8).astype(np.int32)
        weights, least = np.split(values, [kinds * DIRECTIONS * WEIGHTS])
        return cls(weights.reshape(kinds, DIRECTIONS, WEIGHTS), least.reshape(LEVELS + 1, kinds) % SIZES)

    @staticmethod
    def nbytes(channels: int) -> int:
        """Return the bytes of both for so many channels."""
        return min(channels, 2) * (DIRECTIONS * WEIGHTS + LEVELS + 1)

    def of(self, band: Band) -> tuple[Ints, int]:
        """Return the weights of a band [WEIGHTS, planes, 1], and the size where all around is 0."""
        kind = min(band.colour, 1)
        weights = self.weights[kind, DIRECTIONS - 1 :] if band.shape[0] == 1 else self.weights[kind, : DIRECTIONS - 1]
        return weights.T[:, :, None], round(UNIT * scale_of(int(self.least[band.level, kind])))


def scale_of(size: float) -> float:
    """Return the scale of a distribution; the mean magnitude of its numbers is a little less."""
    return float(2.0 ** (size / 6 - 4))


@functools.cache
def _bounds() -> Ints:
    """Return the sum from which on each distribution but the first is used."""
    return np.array([round(UNIT * scale_of(size - 0.5)) for size in range(1, SIZES)], np.int32)


def limit_of(level: int) -> int:
    """Return the largest magnitude at a level."""
    return LIMITS[min(level, len(LIMITS) - 1)]


@functools.cache
def distributions(limit: int) -> NDArray[np.float32]:
    """Return the shares of −limit … limit in each distribution, float32 [SIZES, 2·limit + 1]; multiples of 2^-24."""
    zero, ratio = np.array([_geometric(size) for size in range(SIZES)]).T
    out = np.zeros((SIZES, 2 * limit + 1), np.int64)
    out[:, limit] = zero << 8
    tail = ((1 << 24) - (zero << 8)) * ((1 << 16) - ratio) >> 17
    for magnitude in range(1, limit + 1):
        out[:, limit + magnitude] = out[:, limit - magnitude] = np.maximum(tail, 1)
        tail = tail * ratio >> 16
    return (out / 2.0**24).astype(np.float32)


def _geometric(size: int) -> tuple[int, int]:
    """Return, for a Laplace distribution of that scale rounded to whole numbers, two shares in units of 2^-16.

    They are the share of 0, and the ratio of each magnitude's share to the share of the one before.
    """
    scale = scale_of(size)
    return min(round(-np.expm1(-0.5 / scale) * 2**16), 2**16 - 4), max(round(np.exp(-1 / scale) * 2**16), 1)


@functools.cache
def costs(limit: int) -> NDArray[np.float64]:
    """Return the bits of each magnitude 0 … limit in each distribution, with its sign, float64 [SIZES, limit + 1]."""
    shares = distributions(limit)[:, limit:].astype(np.float64)
    total = 2 * shares.sum(1, keepdims=True) - shares[:, :1]
    bits: NDArray[np.float64] = -np.log2(shares / total)
    return bits


def least_bits(limit: int) -> float:
    """Return the bits that a number takes at least, whatever the distribution."""
    return float(costs(limit).min())


def _base(sizes: Sizes, band: Band, parent: Ints | None, before: Ints | None) -> tuple[Ints, Ints]:
    """Return the sums that the least size, the coarser band and the colour before give each number, and the band's weights."""
    weights, least = sizes.of(band)
    total = np.full(band.shape, least, np.int32)
    if parent is not None:
        above = np.pad(np.abs(parent), ((0, 0), (1, 1), (1, 1)))
        rows = above[:, :-2] + above[:, 1:-1] + above[:, 2:]
        around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] - above[:, 1:-1, 1:-1]
        added = weights[-3, ..., None] * above[:, 1:-1, 1:-1] + weights[-2, ..., None] * around
        total += added.repeat(2, 1).repeat(2, 2)[:, : band.shape[1], : band.shape[2]]
    if before is not None:
        total += weights[-1, ..., None] * np.abs(before)
    return total, weights


def distribution_of(sizes: Sizes, band: Band, numbers: Ints, parent: Ints | None, before: Ints | None) -> Ints:
    """Return the distribution of each number of a band [planes, h, w].

    `parent` is the same colour's next coarser band, `before` the same level's band of the colour before, or None.
    """
    total, weights = _base(sizes, band, parent, before)
    (_, height, width), near = band.shape, np.pad(np.abs(numbers), ((0, 0), (2, 0), (2, 2)))
    for weight, places in zip(weights, NEAR, strict=False):
        for row, column in places:
            total += weight[..., None] * near[:, 2 + row : 2 + row + height, 2 + column : 2 + column + width]
    return _distribution(total)


def _distribution(total: Ints) -> Ints:
    return np.searchsorted(_bounds(), total, "right").astype(np.int32)


def wave_count(height: int, width: int) -> int:
    """Return how many waves a band is coded in."""
    return width + 2 * (height - 1)


def _waves(height: int, width: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Return the places that can be coded together, wave by wave: their neighbours lie in earlier waves."""
    rows = np.arange(height)
    waves = []
    for wave in range(wave_count(height, width)):
        here = rows[max(0, -(-(wave - width + 1) // 2)) : wave // 2 + 1]
        waves.append((here, wave - 2 * here))
    return waves


def _categorical(*shares: Any) -> Any:
    """Return the coder's model of shares that are passed here, or with each call."""
    return stream("field").model.Categorical(*shares, perfect=False)


def write_band(encoder: Any, sizes: Sizes, band: Band, numbers: Ints, parent: Ints | None, before: Ints | None) -> None:
    """Code a band [planes, h, w] by the distributions of `distribution_of`."""
    which, limit = distribution_of(sizes, band, numbers, parent, before), limit_of(band.level)
    model, table = _categorical(), distributions(limit)
    for rows, columns in _waves(*band.shape[1:]):
        symbols = (numbers[:, rows, columns] + limit).flatten().astype(np.int32)
        encoder.encode(symbols, model, table[which[:, rows, columns].flatten()])


def read_band(decoder: Any, sizes: Sizes, band: Band, parent: Ints | None, before: Ints | None) -> Ints:
    """Decode the band [planes, h, w] that `write_band` coded."""
    (planes, height, width), limit = band.shape, limit_of(band.level)
    numbers, near = np.zeros(band.shape, np.int32), np.zeros((planes, height + 2, width + 4), np.int32)
    base, weights = _base(sizes, band, parent, before)
    model, table = _categorical(), distributions(limit)
    for rows, columns in _waves(height, width):
        total = base[:, rows, columns]
        for weight, places in zip(weights, NEAR, strict=False):
            for row, column in places:
                total += weight * near[:, rows + 2 + row, columns + 2 + column]
        which = _distribution(total)
        values = decoder.decode(model, table[which.flatten()]).reshape(which.shape) - limit
        numbers[:, rows, columns] = values
        near[:, rows + 2, columns + 2] = np.abs(values)
    return numbers


def write_codes(encoder: Any, size: int, codes: Ints) -> None:
    """Code numbers [n] that have no neighbours, by one distribution."""
    encoder.encode(codes + LIMITS[0], _categorical(distributions(LIMITS[0])[size]))


def read_codes(decoder: Any, size: int, count: int) -> Ints:
    """Decode the numbers that `write_codes` coded."""
    codes: Ints = decoder.decode(_categorical(distributions(LIMITS[0])[size]), count) - LIMITS[0]
    return codes


def best_size(codes: Ints) -> int:
    """Return the distribution that codes numbers in the fewest bits."""
    return int(np.argmin(costs(LIMITS[0])[:, np.abs(codes)].sum(1)))


def encoder() -> Any:
    """Return a range encoder."""
    return stream("field").queue.RangeEncoder()


def coded(encoder: Any) -> bytes:
    """Return the bytes that an encoder wrote: words of 32 bits, little-endian."""
    data: bytes = encoder.get_compressed().astype("<u4").tobytes()
    return data


def decoder(data: bytes) -> Any:
    """Return a range decoder."""
    return stream("field").queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
