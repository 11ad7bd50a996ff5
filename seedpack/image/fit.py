"""Train a field on one image, until it has a size or a quality."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from seedpack.errors import ModelError
from seedpack.image import coding
from seedpack.image.codec import Field, FieldCodec, head_bytes, packed, packed_bytes, rendered, unit_of
from seedpack.image.network import cells_of
from seedpack.image.wavelet import LEVELS, Band, analysed, synthesised, with_context

STEPS = 200
PRICE = 0.18  # of a bit in squared error, over the squared unit of the bands
SMALLEST, LARGEST = 0.01, 1.0  # unit
SAVED, LOST = 0.15, 0.3  # of the bits, and in dB, by training
REACTION = 10  # of the price, over all steps, to the distance from the aim
CHECKS = 10  # in so many steps, after the first quarter
CLOSE = 0.02  # 2% of the bits, or 0.04 dB
CODE_BITS = 7  # about, of a coefficient
BY_CHANCE = 0.95  # of the steps
LAST = 1.2  # times the steps: an aim that is not met by then takes a unit that moves again, which costs quality
WIDE = 0.15  # by which rounding at first prefers zeros
START = (0.2, 0.2, 0.05, 0.05, 0.04, 0.01, 0.05, 0.02, 0.06)  # weights of the magnitudes around a number
Watch = Callable[[int], object]


class Fit(nn.Module):
    """A field while it is trained: numbers of bands, coefficients, and the weights by which bits follow from neighbours.

    Args:
        image: float32 [channels, height, width], 0 to 1.
        codec: its settings but the sizes.
    """

    def __init__(self, image: Tensor, codec: FieldCodec):
        super().__init__()
        self.cells = cells_of(image)[None]
        self.network = codec.network((image.shape[1], image.shape[2] * codec.channels))
        self.bands = self.network.bands()
        self.noise = torch.Generator().manual_seed(codec.seed)
        self.coefs = nn.Parameter(
            torch.randn(1, codec.count, generator=self.noise, dtype=image.dtype) * codec.count**-0.5
        )
        self.numbers = nn.ParameterList(
            x / unit_of(band) for x, band in zip(analysed(image - 0.5), self.bands, strict=True)
        )
        kinds = min(codec.channels, 2)
        self.weights = nn.Parameter(
            torch.tensor(START, dtype=image.dtype).expm1().log().repeat(kinds, coding.DIRECTIONS, 1)
        )
        self.least = nn.Parameter(torch.full((LEVELS + 1, kinds), -2.0, dtype=image.dtype))
        self.unit = self.start_unit = 1.0
        self.fixed = 8 * head_bytes(codec.channels) + CODE_BITS * codec.count
        self.places = torch.zeros(len(coding.NEAR), 3, 5, dtype=image.dtype)
        for place, near in zip(self.places, coding.NEAR, strict=True):
            for row, column in near:
                place[2 + row, 2 + column] = 1

    @property
    def step(self) -> float:
        """The step of the coefficients' codes."""
        return max(float(self.coefs.detach().abs().max()), 1e-6) / coding.LIMITS[0]

    def codes(self) -> list[Tensor]:
        """Return the numbers, trained in the unit of the start, in the present unit; not rounded."""
        return [x * (self.start_unit / self.unit) for x in self.numbers]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the mean squared error and the expected bits; differentiable as if nothing were rounded.

        In training numbers are rounded up or down by chance, in proportion, so that both are smooth in them; in evaluation
        to the nearest.
        """
        numbers = self.codes()
        whole = _whole(numbers, self.bands)
        rounded = whole
        if self.training:
            rounded = [(x.detach() + torch.rand(x.shape, generator=self.noise, dtype=x.dtype)).floor() for x in numbers]
        coefs = _straight(self.coefs, (self.coefs / self.step).round() * self.step)
        values = [
            _straight(x, value) * (self.unit * unit_of(band))
            for x, value, band in zip(numbers, rounded, self.bands, strict=True)
        ]
        cells = self.network.cells(coefs, values)
        return (cells - self.cells).square().mean(), self.bits(numbers, whole) + self.fixed

    def bits(self, numbers: list[Tensor], whole: list[Tensor]) -> Tensor:
        """Return the bits that the coder expects with these neighbours; of a number between two whole ones in proportion."""
        magnitudes, total = [x.detach().abs() for x in whole], whole[0].new_zeros(())
        weights, least = nn.functional.softplus(self.weights), nn.functional.softplus(self.least)
        context = with_context(self.bands, magnitudes)
        for x, near, (band, parent, before) in zip(numbers, magnitudes, context, strict=True):
            kind, (planes, height, width) = min(band.colour, 1), band.shape
            own_weights = weights[kind, -1:] if planes == 1 else weights[kind, :-1]
            kernels = torch.einsum("pk,krc->prc", own_weights[:, : len(coding.NEAR)], self.places)[:, None]
            near = nn.functional.pad(near[None], (2, 2, 2, 0))
            scale = least[band.level, kind] + nn.functional.conv2d(near, kernels, groups=planes)[0]
            own, around, colour = own_weights[:, len(coding.NEAR) :, None, None].unbind(1)
            if parent is not None:
                above = (own - around) * parent + 9 * around * nn.functional.avg_pool2d(parent, 3, 1, 1)
                scale = scale + above.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width]
            if before is not None:
                scale = scale + colour * before
            total = total + _laplace_bits(x.abs(), scale).sum()
        return total

    def start(self, bits: int | None, psnr: float) -> None:
        """Start from the unit that is about right for an aim."""
        low, high = math.log(SMALLEST), math.log(LARGEST)
        with torch.no_grad():
            for _ in range(9):
                unit = math.exp((low + high) / 2)
                first = [x.sign() * (x.abs() / unit + 0.5 - WIDE).floor() for x in self.numbers]
                if bits is not None:
                    coarser = (1 - SAVED) * float(self.bits(first, first)) + self.fixed > bits
                else:
                    values = [x * (unit * unit_of(band)) for x, band in zip(first, self.bands, strict=True)]
                    image, _ = synthesised(values, self.network.channels, self.network.height, self.network.width)
                    error = (cells_of(image)[None] + 0.5 - self.cells).square().mean()
                    coarser = float(error) < 10 ** (-(psnr + LOST) / 10)
                low, high = (math.log(unit), high) if coarser else (low, math.log(unit))
            self.unit = self.start_unit = unit
            for x in self.numbers:
                x /= unit

    def sizes(self) -> coding.Sizes:
        """Return the weights and least sizes as the coder takes them."""
        weights = (nn.functional.softplus(self.weights.detach()) * coding.UNIT).round().clamp(0, 255)
        least = 6 * (nn.functional.softplus(self.least.detach()).log2() + 4)
        return coding.Sizes(weights.int().numpy(), least.round().clamp(0, coding.SIZES - 1).int().numpy())

    def field(self) -> Field:
        """Return the field as it is stored."""
        whole = _whole(self.codes(), self.bands)
        codes = (self.coefs.detach() / self.step).round().int()[0].numpy()
        return Field(codes, self.step, self.unit, [x.int().numpy() for x in whole])


def _whole(numbers: list[Tensor], bands: list[Band]) -> list[Tensor]:
    """Round numbers to the nearest that can be coded."""
    limits = [coding.limit_of(band.level) for band in bands]
    return [x.detach().round().clamp(-limit, limit) for x, limit in zip(numbers, limits, strict=True)]


def _straight(x: Tensor, value: Tensor) -> Tensor:
    """Return a value in place of x, with a gradient that passes straight through to x."""
    return x + (value - x).detach()


def _laplace_bits(magnitude: Tensor, scale: Tensor) -> Tensor:
    """Return −log2 of the probability of [k − ½, k + ½] under Laplace distributions for whole k; straight lines between."""
    rate = 1 / scale.clamp(coding.scale_of(0), coding.scale_of(coding.SIZES - 1))
    zero = -torch.log2(-torch.expm1(-0.5 * rate))
    more = rate / math.log(2)  # for each magnitude beyond 1
    one = 1 + zero + 0.5 * more - torch.log2(1 + torch.exp(-0.5 * rate))
    return zero + magnitude.clamp_max(1) * (one - zero) + (magnitude - 1).clamp_min(0) * more


@torch.enable_grad()
def fitted(
    image: Tensor,
    codec: FieldCodec,
    *,
    bits: int | None = None,
    psnr: float = 0.0,
    steps: int = STEPS,
    watch: Watch = lambda done: None,
) -> tuple[Field, list[bytes]]:
    """Train a field on an image; return it and its streams.

    The price of a bit moves until they take `bits`, or the image is as good as `psnr`; so does the bands' unit in the first
    half of the steps, and where all else has failed.

    Args:
        image: float32 [channels, height, width], 0 to 1.
        codec: its settings but the sizes.
        bits: that the streams may take.
        psnr: in dB, of the decoded image, where no bits are given.
        steps: of Adam; some more follow where the aim is not met by then.
        watch: called with the steps done since the last call.

    Raises:
        ModelError: the aim cannot be met.
    """
    fit = Fit(image, codec)
    fit.start(bits, psnr)
    rates = [(fit.numbers.parameters(), 0.03), ([fit.coefs], 0.02), ([fit.weights, fit.least], 0.05)]
    groups = [{"params": list(parameters), "lr": rate} for parameters, rate in rates]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share(step / steps))
    nearest = int(BY_CHANCE * steps)  # the step from which numbers are rounded so
    checks = {
        *range(steps // 4, int(LAST * steps), max(1, steps // CHECKS)),
        steps,
        *range(int(LAST * steps), 2 * steps),
    }
    price, bias = (
        math.log(PRICE * fit.unit**2),
        0.0,
    )  # of a bit in squared error; and by how much expectations were short
    best: tuple[Field, list[bytes]] | None = None
    for step in range(2 * steps):
        fit.weights.requires_grad_(step % 4 == 0)  # half the work of a step is their gradient
        error, expected = fit.train(step < nearest)()
        past = _past(bits, psnr, expected.item(), -10 * math.log10(error.item()))
        if step in checks:
            field = fit.field()
            spent = 8 * packed_bytes(field, fit.sizes(), fit.bands)
            measured = _past(bits, psnr, spent, psnr_of(image, rendered(fit.network, field)))
            if step >= steps and (measured >= 0 if bits is None else measured <= 0):
                streams = packed(field, fit.sizes(), fit.bands)
                if bits is None or 8 * sum(map(len, streams)) <= bits:
                    best = field, streams
            if best is not None and (step >= LAST * steps or abs(measured) < CLOSE):
                break
            bias = measured - past
        if step >= steps // 4:  # before, most bits are still those of the start
            push = past + bias + (CLOSE / 2 if bits is not None else -CLOSE / 2)
            if step >= steps:  # the distance left is small, and the price must move all the same
                push = math.copysign(max(abs(push), 0.3), push)
            move = REACTION / steps * max(-1.0, min(1.0, push))
            price += move
            if step < steps // 2 or step >= LAST * steps:
                fit.unit = min(LARGEST, max(SMALLEST, fit.unit * math.exp(0.5 * move)))
        loss = error + math.exp(price) * expected / image.numel()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step < steps:
            watch(1)
    if best is None:
        if bits is None:
            raise ModelError(
                f"the image cannot be brought to {psnr} dB; ask for less, or allow more steps (sharp edges of colour limit it)"
            )
        raise ModelError(f"the image cannot be brought to so few bytes ({bits // 8:,} beside the header); ask for more")
    return best


def _share(done: float) -> float:
    """Return the share of the learning rates, when so much of the steps is done."""
    return max(0.02, 0.5 + 0.5 * math.cos(math.pi * done)) if done < 1 else 0.1 if done < LAST else 1.0


def _past(bits: int | None, psnr: float, spent: float, good: float) -> float:
    """Return how far an aim is passed: the logarithm of bits spent over those to spend, or half of the decibels to spare."""
    return math.log(spent / bits) if bits is not None else (good - psnr) / 2


def psnr_of(image: Tensor, pixels: Tensor) -> float:
    """Return the PSNR of pixels 0 … 255 of an image 0 to 1, in dB; for equal ones that of a quarter of a step."""
    return -10 * math.log10(max(float((pixels / 255 - image).square().mean()), (0.25 / 255) ** 2))
