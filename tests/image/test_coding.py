"""Bands as bytes."""

from __future__ import annotations

import numpy as np
import pytest

from seedpack.image import coding
from seedpack.image.wavelet import LEVELS, Band, bands, with_context


def sizes(channels: int, seed: int = 0) -> coding.Sizes:
    draw, kinds = np.random.default_rng(seed), min(channels, 2)
    return coding.Sizes(
        draw.integers(0, 40, (kinds, coding.DIRECTIONS, coding.WEIGHTS)).astype(np.int32),
        draw.integers(6, 30, (LEVELS + 1, kinds)).astype(np.int32),
    )


def numbers(places: list[Band], seed: int = 0) -> list[coding.Ints]:
    """Of patches that are more or less alive, coarser ones larger."""
    draw, found = np.random.default_rng(seed), []
    for band in places:
        (planes, height, width), limit = band.shape, coding.limit_of(band.level)
        patches = np.exp(2 * draw.normal(size=(planes, -(-height // 16), -(-width // 16))) + band.level - 1)
        active = patches.repeat(16, 1).repeat(16, 2)[:, :height, :width]
        found.append(np.clip(np.rint(draw.laplace(size=band.shape) * active), -limit, limit).astype(np.int32))
    return found


def coded(given: coding.Sizes, places: list[Band], found: list[coding.Ints]) -> bytes:
    encoder = coding.encoder()
    for own, (band, parent, before) in zip(found, with_context(places, found), strict=True):
        coding.write_band(encoder, given, band, own, parent, before)
    return coding.coded(encoder)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 1, 1), (3, 1, 7), (3, 9, 1), (3, 66, 100), (1, 129, 3)])
def test_what_is_written_is_read(channels: int, height: int, width: int) -> None:
    places = bands(channels, height, width)
    given, expected = sizes(channels), numbers(places)
    decoder = coding.decoder(coded(given, places, expected))
    again = coding.Sizes.from_bytes(given.to_bytes(), channels)
    found: list[coding.Ints] = []
    assert len(given.to_bytes()) == coding.Sizes.nbytes(channels)
    for band, parent, before in with_context(places, found):
        found.append(coding.read_band(decoder, again, band, parent, before))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("level", [0, 1, 2, LEVELS])
def test_the_largest_numbers_can_be_coded(level: int) -> None:
    most = coding.limit_of(level)
    plane = np.array([[most, -most, 0, most], [-most, 1, 0, 0]], np.int32)
    band = Band(level, 0, (1 if level == LEVELS else 3, 2, 4))
    whole = plane[None].repeat(band.shape[0], 0)
    largest = coding.Sizes(np.full((1, 4, coding.WEIGHTS), 255, np.int32), np.full((LEVELS + 1, 1), 83, np.int32))
    for given in (sizes(1), largest):
        encoder = coding.encoder()
        coding.write_band(encoder, given, band, whole, None, None)
        decoder = coding.decoder(coding.coded(encoder))
        np.testing.assert_array_equal(coding.read_band(decoder, given, band, None, None), whole)


def test_bytes_follow_from_the_costs() -> None:
    places = bands(3, 256, 384)
    given, found, bits = sizes(3), numbers(places), 0.0
    for own, (band, parent, before) in zip(found, with_context(places, found), strict=True):
        which = coding.distribution_of(given, band, own, parent, before)
        bits += coding.costs(coding.limit_of(band.level))[which, np.abs(own)].sum()
    assert 8 * len(coded(given, places, found)) == pytest.approx(bits, rel=0.01, abs=64)


def test_what_is_known_saves_bytes() -> None:
    places = bands(1, 128, 192)
    found = numbers(places)
    weights = np.array([26, 26, 6, 6, 5, 1, 6, 2, 8], np.int32)[None, None].repeat(coding.DIRECTIONS, 1)
    least = np.full((LEVELS + 1, 1), 14, np.int32)
    alone = min(
        len(coded(coding.Sizes(0 * weights, 0 * least + size), places, found)) for size in range(0, coding.SIZES, 3)
    )
    assert len(coded(coding.Sizes(weights, least), places, found)) < 0.9 * alone


def test_distributions_are_whole_numbers_that_no_machine_rounds_otherwise() -> None:
    for limit in coding.LIMITS:
        units = coding.distributions(limit).astype(np.float64) * 2**24
        assert (units == np.rint(units)).all() and (units >= 1).all()
    for size in range(coding.SIZES):
        scale = coding.scale_of(size)
        exacts = [-np.expm1(-0.5 / scale) * 2**16, np.exp(-1 / scale) * 2**16]
        exacts += [coding.UNIT * coding.scale_of(size - 0.5), coding.UNIT * scale] if size % 6 else []
        for exact in exacts:
            assert abs(exact - np.floor(exact) - 0.5) > 1e-6, "no tie that two machines could break apart"


def test_codes_without_neighbours() -> None:
    codes = np.rint(np.random.default_rng(0).normal(size=500) * 30).clip(-127, 127).astype(np.int32)
    encoder, size = coding.encoder(), coding.best_size(codes)
    coding.write_codes(encoder, size, codes)
    data = coding.coded(encoder)
    np.testing.assert_array_equal(coding.read_codes(coding.decoder(data), size, 500), codes)
    assert len(data) < 500
