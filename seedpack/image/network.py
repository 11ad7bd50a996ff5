"""The network of a neural field: wavelet bands to pixels, its weights one combination of pseudorandom basis vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seedpack.image.wavelet import Band, bands, synthesised
from seedpack.kernels.basis import HADAMARD, noise_basis
from seedpack.kernels.basis.weight import basis_weight

CELL = 2  # pixels a side that one place of the network stands for
LEARNT = 0.02  # what the network starts by adding, beside numbers of about 1


@dataclass(frozen=True)
class Network:
    """Bands → pixels: the inverse wavelet transform, and a network of three 3×3 convolutions that adds what it has learnt.

    It works at half the resolution: it sees the brightness of 2×2 pixels and the mean differences of their colours.

    Attributes:
        height: of the image.
        width: of the image.
        channels: of the image.
        hidden: width of the network.
        seed: of the basis.
    """

    height: int
    width: int
    channels: int
    hidden: int
    seed: int

    def bands(self) -> list[Band]:
        """Return the bands of the image, coarse ones first."""
        return bands(self.channels, self.height, self.width)

    def shapes(self) -> list[tuple[tuple[int, ...], float]]:
        """Return the shapes of the weights, in their order, and the standard deviation that each starts at."""
        hidden, pixels = self.hidden, CELL * CELL
        shapes: list[tuple[tuple[int, ...], float]] = []
        for out, inputs, gain in (
            (hidden, pixels + self.channels - 1, 1.0),
            (hidden, hidden, 1.0),
            (pixels * self.channels, hidden, LEARNT),
        ):
            std = gain * (9 * inputs) ** -0.5
            shapes += [((out, inputs, 3, 3), std), ((out,), 0.5 * std)]
        return shapes

    def weights(self, coefs: Tensor) -> list[Tensor]:
        """Return the weights of coefficients [1, count]."""
        shapes = self.shapes()
        counts = [math.prod(shape) for shape, _ in shapes]
        flat = basis_weight(coefs, noise_basis(HADAMARD, self.seed), rows=1, columns=sum(counts)).flatten()
        return [part.view(shape) * std for part, (shape, std) in zip(flat.split(counts), shapes, strict=True)]

    def cells(self, coefs: Tensor, numbers: list[Tensor]) -> Tensor:
        """Return the pixels of each cell, [1, channels · CELL², height / CELL, width / CELL], rounded up.

        Args:
            coefs: float32 [1, count].
            numbers: float32, of the shapes of `bands`.
        """
        image, half = synthesised(numbers, self.channels, self.height, self.width)
        cells = cells_of(image)[None]
        brightness = cells.unflatten(1, (self.channels, -1)).mean(1)
        y = torch.cat((2 * brightness, half[None, 1:]), 1)
        first, first_bias, second, second_bias, third, third_bias = self.weights(coefs)
        y = nn.functional.gelu(nn.functional.conv2d(y, first, first_bias, padding=1))
        y = nn.functional.gelu(nn.functional.conv2d(y, second, second_bias, padding=1))
        return 0.5 + cells + nn.functional.conv2d(y, third, third_bias, padding=1)

    def render(self, coefs: Tensor, numbers: list[Tensor]) -> Tensor:
        """Return pixels [channels, height, width], about 0 to 1, not clipped."""
        return nn.functional.pixel_shuffle(self.cells(coefs, numbers), CELL)[0, :, : self.height, : self.width]


def cells_of(image: Tensor) -> Tensor:
    """Return the pixels of each cell of an image [channels, height, width]: [channels · CELL², height / CELL, width / CELL].

    Both are rounded up; cells repeat the last pixel beyond the edge.
    """
    odd = (0, image.shape[2] % CELL, 0, image.shape[1] % CELL)
    return nn.functional.pixel_unshuffle(nn.functional.pad(image[None], odd, mode="replicate"), CELL)[0]
