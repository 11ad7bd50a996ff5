"""Wavelet bands of images."""

from __future__ import annotations

import pytest
import torch

from seedpack.image.wavelet import LEVELS, analysed, bands, synthesised, with_context

SIZES = [(1, 1, 1), (3, 45, 70), (1, 33, 20), (3, 2, 17), (3, 256, 64)]


@pytest.mark.parametrize(("channels", "height", "width"), SIZES)
def test_bands_make_the_image_again(channels: int, height: int, width: int) -> None:
    image = torch.rand(1, height, width, generator=torch.Generator().manual_seed(0)).repeat(channels, 1, 1)
    numbers = analysed(image)
    assert [x.shape for x in numbers] == [band.shape for band in bands(channels, height, width)]
    again, half = synthesised(numbers, channels, height, width)
    torch.testing.assert_close(again, image, atol=1e-5, rtol=0)
    assert half.shape == (channels, -(-height // 2), -(-width // 2))


def test_a_grey_image_has_no_colours_and_coloured_ones_lose_only_the_finest() -> None:
    grey = torch.rand(1, 32, 32).repeat(3, 1, 1)
    for x, band in zip(analysed(grey), bands(3, 32, 32), strict=True):
        assert band.colour == 0 or x.abs().max() < 1e-5
    smooth = torch.stack([torch.linspace(0, 1, 64).expand(64, -1), torch.full((64, 64), 0.3), torch.zeros(64, 64)])
    torch.testing.assert_close(synthesised(analysed(smooth), 3, 64, 64)[0], smooth, atol=1e-2, rtol=0)


def test_they_are_near_to_orthonormal() -> None:
    """An error in a number is one of about that size in the image, whatever the band."""
    places = bands(3, 256, 256)
    for i, band in enumerate(places):
        numbers = [torch.zeros(other.shape) for other in places]
        numbers[i].view(-1)[numbers[i].numel() // 2 + band.shape[2] // 2] = 1.0
        assert 0.8 < float(synthesised(numbers, 3, 256, 256)[0].norm()) < 1.3, band


def test_context_is_of_earlier_bands() -> None:
    places = bands(3, 64, 64)
    found: list[int] = []
    for place, (band, parent, before) in enumerate(with_context(places, found)):
        assert (parent is None) == (band.level >= LEVELS - 1)
        assert parent is None or places[parent][:2] == (band.level + 1, band.colour)
        assert before is None or places[before][:2] == (band.level, band.colour - 1)
        found.append(place)
