"""The network of a neural field: grids of numbers to pixels, its weights one combination of pseudorandom bases."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seedpack.kernels.basis_decode.reference import HADAMARD
from seedpack.kernels.basis_decode.weight import basis_weight

CELL = 2  # pixels a side that one place of the network stands for
COARSEST = 7
GAIN, GROWTH = 12.0, 1.5
LEARNT = 0.05  # what the network starts by adding, beside numbers of about 1
COLOURS = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))  # brightness and differences to RGB


@dataclass(frozen=True)
class Network:
    """Grids → pixels.

    Grid l, from `finest` to COARSEST, has a plane of one number for each 2^l by 2^l pixels; from 2 on, of an image in colours,
    two more. All are brought to the size of grid 1 (by bicubic interpolation; grid 0, which has a number for each pixel, as four
    planes). Their sum is brightness and two colour differences (those of JPEG); to the pixels of each place a linear map and a
    network of three layers, which see all planes there, add what they have learnt.

    Attributes:
        height: of the image.
        width: of the image.
        channels: of the image.
        finest: number of the finest grid, 0 or 1.
        hidden: width of the network.
        seed: of the bases.
    """

    height: int
    width: int
    channels: int
    finest: int
    hidden: int
    seed: int

    def grids(self) -> list[tuple[int, int, int]]:
        """Shapes [planes, height, width], finest first."""
        return [
            (1 if level < 2 else self.channels, -(-self.height >> level), -(-self.width >> level))
            for level in range(self.finest, COARSEST + 1)
        ]

    def gains(self) -> list[float]:
        """What each grid's numbers are divided by: coarse ones stand for more pixels, and are finer."""
        return [GAIN * GROWTH ** (level - 1) for level in range(self.finest, COARSEST + 1)]

    def shapes(self) -> list[tuple[tuple[int, ...], float]]:
        """Of the weights, in their order, and the standard deviation that each starts at."""
        hidden, out = self.hidden, CELL * CELL * self.channels
        inputs = sum(planes for planes, _, _ in self.grids()) + (0 if self.finest else CELL * CELL - 1)
        weights: list[tuple[int, ...]] = [
            (hidden, inputs, 1, 1),
            (hidden, hidden, 3, 3),
            (out, hidden, 3, 3),
            (out, inputs, 1, 1),
        ]
        gains = (1.0, 1.0, LEARNT, LEARNT)
        sizes = [(shape, gain * math.prod(shape[1:]) ** -0.5) for shape, gain in zip(weights, gains, strict=True)]
        biased: list[tuple[tuple[int, ...], float]] = []
        for shape, std in sizes:
            biased += [(shape, std), (shape[:1], 0.5 * std)]
        return biased[:-1]

    def weights(self, coefs: Tensor) -> list[Tensor]:
        """Of coefficients [1, count]."""
        shapes = self.shapes()
        counts = [math.prod(shape) for shape, _ in shapes]
        flat = basis_weight(
            coefs, seed=self.seed, generator=HADAMARD, rows=1, columns=sum(counts), key="", index=None
        ).flatten()
        return [part.view(shape) * std for part, (shape, std) in zip(flat.split(counts), shapes, strict=True)]

    def cells(self, coefs: Tensor, grids: list[Tensor]) -> Tensor:
        """What each place gives: the pixels of its cell, [1, channels · CELL², height / CELL, width / CELL], rounded up.

        Args:
            coefs: float32 [1, count].
            grids: float32, whole numbers, finest first, of the shapes that `grids` gives.
        """
        first, first_bias, second, second_bias, third, third_bias, past = self.weights(coefs)
        height, width = -(-self.height // CELL), -(-self.width // CELL)
        larger = []
        for level, (grid, gain) in enumerate(zip(grids, self.gains(), strict=True), self.finest):
            if level == 0:
                larger.append(cells_of(grid / gain))
            else:
                down, right = (
                    _upsampling(n, m, grid.device) for n, m in zip(grid.shape[1:], (height, width), strict=True)
                )
                larger.append(grid / gain if level == 1 else down @ (grid / gain) @ right.T)
        seen = torch.cat(larger).permute(1, 2, 0)
        y = nn.functional.gelu(nn.functional.linear(seen, first.flatten(1), first_bias)).permute(2, 0, 1)[None]
        y = nn.functional.gelu(nn.functional.conv2d(y, second, second_bias, padding=1))
        straight = nn.functional.linear(seen, past.flatten(1) + self._colours(seen.device)).permute(2, 0, 1)[None]
        return 0.5 + straight + nn.functional.conv2d(y, third, third_bias, padding=1)

    def _colours(self, device: torch.device) -> Tensor:
        """The sum of each kind of plane to the pixels of a cell, [channels · CELL², planes]."""
        each = torch.tensor(COLOURS if self.channels == 3 else ((1.0,),), device=device)
        every = each.repeat_interleave(CELL * CELL, 0)
        sums = [every[:, :planes] for planes, _, _ in self.grids()]
        if not self.finest:
            sums[0] = torch.kron(each[:, :1], torch.eye(CELL * CELL, device=device))
        return torch.cat(sums, 1)

    def render(self, coefs: Tensor, grids: list[Tensor]) -> Tensor:
        """Pixels [channels, height, width], about 0 to 1, not clipped."""
        return nn.functional.pixel_shuffle(self.cells(coefs, grids), CELL)[0, :, : self.height, : self.width]


def cells_of(image: Tensor) -> Tensor:
    """The pixels of each place of an image [channels, height, width]: [channels · CELL², height / CELL, width / CELL], both
    rounded up; what is outside is as the pixel beside."""
    odd = (0, image.shape[2] % CELL, 0, image.shape[1] % CELL)
    return nn.functional.pixel_unshuffle(nn.functional.pad(image[None], odd, mode="replicate"), CELL)[0]


@functools.lru_cache(maxsize=64)
def _upsampling(size: int, larger: int, device: torch.device) -> Tensor:
    """Bicubic interpolation of a column of numbers as a matrix [larger, size]: far faster so on CPUs."""
    columns = torch.eye(size)[None, None]
    return nn.functional.interpolate(columns, (larger, size), mode="bicubic", align_corners=False)[0, 0].to(device)
