"""Confidence intervals of means over tokens that depend on their neighbours."""

from __future__ import annotations

import math
from statistics import NormalDist

from torch import Tensor

BLOCK, FEWEST = 256, 4  # tokens of a block, so that blocks hardly depend on each other; blocks
Interval = tuple[float, float]


def mean_interval(values: Tensor) -> Interval | None:
    """Return the 95% confidence interval of the mean of values [n] in their order, by the means of blocks (batch means).

    None where there are too few values. The quantile of Student's distribution is Cornish and Fisher's expansion.

    >>> import torch
    >>> mean_interval(torch.ones(1024))
    (1.0, 1.0)
    """
    blocks = len(values) // BLOCK
    if blocks < FEWEST:
        return None
    means = values[: blocks * BLOCK].double().view(blocks, BLOCK).mean(1)
    half = _student(blocks - 1) * float(means.std()) / math.sqrt(blocks)
    centre = float(values.double().mean())
    return centre - half, centre + half


def _student(freedom: int) -> float:
    """Return the 97.5% quantile of Student's distribution, within 1% from three degrees of freedom on."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))
