"""Grids as bytes."""

from __future__ import annotations

import numpy as np
import pytest

from seedpack.fields import coding


def pyramid(shapes: list[tuple[int, int, int]], seed: int = 0) -> list[coding.Ints]:
    """Grids, finest first, of patches that are more or less alive, coarser ones larger."""
    draw, grids = np.random.default_rng(seed), []
    for level, shape in enumerate(shapes):
        patches = np.exp(2 * draw.normal(size=(shape[0], -(-shape[1] // 16), -(-shape[2] // 16))) + level - 1)
        active = patches.repeat(16, 1).repeat(16, 2)[:, : shape[1], : shape[2]]
        grids.append(np.clip(np.rint(draw.laplace(size=shape) * active), -127, 127).astype(np.int32))
    return grids


def coded(grids: list[coding.Ints]) -> tuple[coding.Sizes, bytes]:
    sizes, encoder = coding.fitted_sizes(grids), coding.encoder()
    for level in reversed(range(len(grids))):
        coding.write_grid(encoder, sizes, level, grids[level], grids[level + 1] if level + 1 < len(grids) else None)
    return sizes, coding.coded(encoder)


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 1, 1)],
        [(1, 1, 7), (1, 1, 4)],
        [(1, 9, 1), (3, 5, 1)],
        [(1, 33, 50), (3, 17, 25), (3, 9, 13)],
        [(3, 64, 3), (3, 32, 2)],
    ],
)
def test_what_is_written_is_read(shapes: list[tuple[int, int, int]]) -> None:
    grids = pyramid(shapes)
    sizes, data = coded(grids)
    again = coding.Sizes.from_bytes(sizes.to_bytes(), len(grids))
    decoder, coarser = coding.decoder(data), None
    for level in reversed(range(len(grids))):
        coarser = coding.read_grid(decoder, again, level, shapes[level], coarser)
        np.testing.assert_array_equal(coarser, grids[level])


def test_the_largest_numbers_can_be_coded() -> None:
    grid = np.array([[[127, -127, 0, 127], [-127, 1, 0, 0]]], np.int32)
    sizes, data = coded([grid])
    np.testing.assert_array_equal(coding.read_grid(coding.decoder(data), sizes, 0, (1, 2, 4), None), grid)


def test_bytes_follow_from_the_costs() -> None:
    grids = pyramid([(1, 128, 192), (3, 64, 96)])
    sizes, data = coded(grids)
    bits = 0.0
    for level, grid in enumerate(grids):
        near, above = coding.contexts(grid, grids[level + 1] if level == 0 else None)
        bits += coding.costs()[sizes.chosen(near, above, level), np.abs(grid)].sum()
    assert 8 * len(data) == pytest.approx(bits, rel=0.01, abs=64)


def test_neighbours_save_bytes() -> None:
    grids = pyramid([(1, 128, 192)])
    _, counts = np.unique(grids[0], return_counts=True)
    alone = -(counts * np.log2(counts / counts.sum())).sum() / 8
    assert len(coded(grids)[1]) < 0.95 * alone


def test_distributions_are_whole_numbers_that_no_machine_rounds_otherwise() -> None:
    units = coding.distributions().astype(np.float64) * 2**24
    assert (units == np.rint(units)).all() and (units >= 1).all()
    for size in range(coding.SIZES):
        scale = 2.0 ** (size / 6 - 4)
        for exact in (-np.expm1(-0.5 / scale) * 2**16, np.exp(-1 / scale) * 2**16):
            assert abs(exact - np.floor(exact) - 0.5) > 1e-6, "no tie that two exponentials could break apart"


def test_codes_without_neighbours() -> None:
    codes = np.rint(np.random.default_rng(0).normal(size=500) * 30).clip(-127, 127).astype(np.int32)
    encoder, size = coding.encoder(), coding.best_size(codes)
    coding.write_codes(encoder, size, codes)
    data = coding.coded(encoder)
    np.testing.assert_array_equal(coding.read_codes(coding.decoder(data), size, 500), codes)
    assert len(data) < 500
