"""Grids of whole numbers as bytes: a range coder whose probabilities follow from what was coded before.

Each number's neighbours that are known, and the number at its place in the next coarser grid, say how large it will be; a
geometric distribution of that size codes it. All of it is whole numbers, so that every machine decodes the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seedpack._constriction import stream

Ints = NDArray[np.int32]
LIMIT = 127  # of a number's magnitude
SIZES = 64  # distributions, from the narrowest to the widest
NEAR = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # classes of 2·(left + above) + above left + above right
ABOVE = (0, 1, 2, 4, 8, 16)  # classes of the coarser grid's magnitude
WORD_BYTES = 4
TURNS = 4


@dataclass(frozen=True)
class Sizes:
    """Which distribution codes a number: the sum of three entries, kept in 0 … SIZES − 1.

    Attributes:
        near: by class of the neighbours.
        above: by class of the number in the coarser grid.
        level: by grid, finest first: of its first plane, and of others.
    """

    near: Ints
    above: Ints
    level: Ints

    def to_bytes(self) -> bytes:
        """As int8."""
        return np.concatenate((self.near, self.above, self.level.flatten())).astype(np.int8).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, levels: int) -> Sizes:
        """Of `nbytes(levels)` bytes."""
        every = np.frombuffer(data, np.int8).astype(np.int32)
        near, above, level = np.split(every, [len(NEAR), len(NEAR) + len(ABOVE)])
        return cls(near, above, level.reshape(levels, 2))

    def chosen(self, near: Ints, above: Ints, level: int) -> Ints:
        """The distribution of each number of a grid, or of some of its places, [planes, …], from its classes."""
        offset = self.level[level, np.minimum(np.arange(len(near)), 1)].reshape(-1, *[1] * (near.ndim - 1))
        found: Ints = np.clip(self.near[near] + self.above[above] + offset, 0, SIZES - 1)
        return found

    @staticmethod
    def nbytes(levels: int) -> int:
        """Of so many grids."""
        return len(NEAR) + len(ABOVE) + 2 * levels


@functools.cache
def distributions() -> NDArray[np.float32]:
    """Shares of −LIMIT … LIMIT in each distribution, float32 [SIZES, 2·LIMIT + 1]; multiples of 2^-24."""
    out = np.zeros((SIZES, 2 * LIMIT + 1), np.int64)
    for size in range(SIZES):
        zero, ratio = _geometric(size)
        out[size, LIMIT] = zero << 8
        tail = ((1 << 24) - (zero << 8)) * ((1 << 16) - ratio) >> 17
        for magnitude in range(1, LIMIT + 1):
            out[size, LIMIT + magnitude] = out[size, LIMIT - magnitude] = max(tail, 1)
            tail = tail * ratio >> 16
    return (out / 2.0**24).astype(np.float32)


def _geometric(size: int) -> tuple[int, int]:
    """Of a Laplace distribution of scale 2^(size / 6 − 4), rounded to whole numbers: the share of 0, and what each magnitude
    has of the one before, in units of 2^-16."""
    scale = 2.0 ** (size / 6 - 4)
    return min(round(-np.expm1(-0.5 / scale) * 2**16), 2**16 - 4), max(round(np.exp(-1 / scale) * 2**16), 1)


@functools.cache
def costs() -> NDArray[np.float64]:
    """Bits of each magnitude 0 … LIMIT in each distribution, with its sign, float64 [SIZES, LIMIT + 1]."""
    shares = distributions()[:, LIMIT:].astype(np.float64)
    total = 2 * shares.sum(1, keepdims=True) - shares[:, :1]
    found: NDArray[np.float64] = -np.log2(shares / total)
    return found


def contexts(grid: Ints, coarser: Ints | None) -> tuple[Ints, Ints]:
    """The classes of each number of a grid [planes, h, w]."""
    near = np.pad(np.abs(grid), ((0, 0), (1, 0), (1, 1)))
    around = 2 * (near[:, 1:, :-2] + near[:, :-1, 1:-1]) + near[:, :-1, :-2] + near[:, :-1, 2:]
    return _class(around, NEAR), _class(_above(grid.shape, coarser), ABOVE)


def _above(shape: tuple[int, ...], coarser: Ints | None) -> Ints:
    """The magnitude of the coarser grid's number at each place."""
    if coarser is None:
        return np.zeros(shape, np.int32)
    return np.abs(coarser[: shape[0]]).repeat(2, 1).repeat(2, 2)[:, : shape[1], : shape[2]]


def _class(value: Ints, bounds: tuple[int, ...]) -> Ints:
    return (np.searchsorted(bounds, value, "right") - 1).astype(np.int32)


def fitted_sizes(grids: list[Ints]) -> Sizes:
    """Those that code some grids, finest first, in the fewest bits: by turns of one entry at a time."""
    counts = np.zeros((len(NEAR), len(ABOVE), 2 * len(grids), LIMIT + 1))
    for level, grid in enumerate(grids):
        near, above = contexts(grid, grids[level + 1] if level + 1 < len(grids) else None)
        kind = np.broadcast_to(2 * level + np.minimum(np.arange(len(grid)), 1)[:, None, None], grid.shape)
        np.add.at(counts, (near, above, kind, np.abs(grid)), 1)
    price = np.tensordot(counts, costs(), (3, 1))  # bits of each class in each distribution
    tables = [np.zeros(size, np.int32) for size in price.shape[:3]]
    tables[0][:] = 3 * np.arange(len(NEAR)) + 6
    tried = np.arange(-SIZES, SIZES)
    for _ in range(TURNS):
        for axis, table in enumerate(tables):
            rest = [
                np.expand_dims(part, [i for i in range(3) if i != own])
                for own, part in enumerate(tables)
                if own != axis
            ]
            others = np.squeeze(rest[0] + rest[1], axis).reshape(-1)
            for entry in np.flatnonzero(np.moveaxis(counts, axis, 0).reshape(len(table), -1).any(1)):
                here = np.take(price, entry, axis).reshape(-1, SIZES)
                bits = np.take_along_axis(here, np.clip(others[:, None] + tried, 0, SIZES - 1), 1).sum(0)
                table[entry] = tried[int(np.argmin(bits))]
    return Sizes(tables[0], tables[1], tables[2].reshape(-1, 2))


def _waves(height: int, width: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Places that can be coded together: their left and upper neighbours lie in earlier waves."""
    rows = np.arange(height)
    waves = []
    for wave in range(width + 2 * (height - 1)):
        some = rows[max(0, -(-(wave - width + 1) // 2)) : wave // 2 + 1]
        waves.append((some, wave - 2 * some))
    return waves


def _categorical(*shares: Any) -> Any:
    """The coder's model of shares that are given here, or with each call."""
    return stream("field", "image").model.Categorical(*shares, perfect=False)


def write_grid(encoder: Any, sizes: Sizes, level: int, grid: Ints, coarser: Ints | None) -> None:
    """Code a grid [planes, h, w]; `coarser` is the next one, or None."""
    chosen = sizes.chosen(*contexts(grid, coarser), level)
    model, table = _categorical(), distributions()
    for rows, columns in _waves(*grid.shape[1:]):
        symbols = (grid[:, rows, columns] + LIMIT).flatten().astype(np.int32)
        encoder.encode(symbols, model, table[chosen[:, rows, columns].flatten()])


def read_grid(decoder: Any, sizes: Sizes, level: int, shape: tuple[int, int, int], coarser: Ints | None) -> Ints:
    """The grid [planes, h, w] that `write_grid` coded."""
    planes, height, width = shape
    grid, near = np.zeros(shape, np.int32), np.zeros((planes, height + 1, width + 2), np.int32)
    above = _class(_above(shape, coarser), ABOVE)
    model, table = _categorical(), distributions()
    for rows, columns in _waves(height, width):
        around = 2 * (near[:, rows + 1, columns] + near[:, rows, columns + 1])
        around += near[:, rows, columns] + near[:, rows, columns + 2]
        chosen = sizes.chosen(_class(around, NEAR), above[:, rows, columns], level)
        values = decoder.decode(model, table[chosen.flatten()]).reshape(chosen.shape) - LIMIT
        grid[:, rows, columns] = values
        near[:, rows + 1, columns + 1] = np.abs(values)
    return grid


def write_codes(encoder: Any, size: int, codes: Ints) -> None:
    """Code numbers [n] that have no neighbours, by one distribution."""
    encoder.encode(codes + LIMIT, _categorical(distributions()[size]))


def read_codes(decoder: Any, size: int, count: int) -> Ints:
    """The numbers that `write_codes` coded."""
    found: Ints = decoder.decode(_categorical(distributions()[size]), count) - LIMIT
    return found


def best_size(codes: Ints) -> int:
    """The distribution that codes numbers in the fewest bits."""
    return int(np.argmin(costs()[:, np.abs(codes)].sum(1)))


def encoder() -> Any:
    """A range encoder."""
    return stream("field", "image").queue.RangeEncoder()


def coded(encoder: Any) -> bytes:
    """What an encoder wrote: words of 32 bits, little-endian."""
    found: bytes = encoder.get_compressed().astype("<u4").tobytes()
    return found


def decoder(data: bytes) -> Any:
    """A range decoder."""
    return stream("field", "image").queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
