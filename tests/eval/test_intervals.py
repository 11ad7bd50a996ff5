from __future__ import annotations

import math

import pytest
import torch

from seedpack.eval.intervals import BLOCK, FEWEST, mean_interval


def test_it_covers_the_mean_as_often_as_it_says() -> None:
    """Values that depend on their neighbours, as losses of tokens do: a moving average of eight."""
    generator, covered, runs = torch.Generator().manual_seed(0), 0, 400
    for _ in range(runs):
        noise = torch.randn(1, 1, 16 * BLOCK + 7, generator=generator)
        values = 3 + torch.nn.functional.avg_pool1d(noise, 8, 1)[0, 0]
        interval = mean_interval(values)
        assert interval is not None
        covered += interval[0] < 3 < interval[1]
    assert 0.92 < covered / runs < 0.98


def test_few_blocks() -> None:
    """With four blocks the half width is Student's quantile for three degrees of freedom, 3.1824, by their deviation."""
    assert mean_interval(torch.ones(FEWEST * BLOCK - 1)) is None
    blocks = torch.tensor([1.0, 2.0, 3.0, 6.0])
    low, high = mean_interval(blocks.repeat_interleave(BLOCK)) or (0, 0)
    assert (low + high) / 2 == pytest.approx(3.0)
    assert (high - low) / 2 == pytest.approx(3.1824 * float(blocks.std()) / math.sqrt(4), rel=1e-2)
