"""Where no configuration is fixed, kernels measure their candidates; here with times made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from seedpack.kernels.common import gpu_configs as configs
from seedpack.kernels.common import gpu_launch as launch
from tests.helpers.marks import slow
from tests.helpers.products import LIMIT, Weight, error, seedlm, trellis

if torch.cuda.is_available():
    pytest.skip("they measure in earnest there", allow_module_level=True)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Candidates run, and each next one is said to be faster than the one before; none is kept on disk."""
    runs: list[None] = []

    def bench(run: Callable[[], object], quantiles: Any) -> list[float]:
        run()
        runs.append(None)
        return [1.0 / len(runs)] * 3

    original = triton.autotune
    monkeypatch.setattr(configs, "fixed", lambda kernel, device: None)
    monkeypatch.setattr(launch, "tuners", {})
    monkeypatch.setattr(
        triton, "autotune", lambda choices, key, cache_results: original(choices, key=key, do_bench=bench)
    )
    return runs


@pytest.mark.parametrize(
    "make", [lambda: trellis(4, 16, 35, 100), *slow(lambda: seedlm(16, 8, 3, 35, 300))], ids=["trellis", "seedlm"]
)
def test_all_candidates_agree(make: Callable[[], Weight], measured: list[None], poison: None) -> None:
    weight = make()
    dense = weight.dense("reference").double()
    for tokens in (1, 5, 33):
        x = torch.randn(tokens, weight.columns)
        for _ in range(2):  # the second call measures nothing
            found = weight.matmul(x, torch.float32, "triton")
            assert error(found, x.double() @ dense.T) < LIMIT[torch.float32]
    assert torch.equal(weight.dense("triton").double(), dense)
    runs = [len(configs.CANDIDATES[name]) * len(tuner.cache) for (name, _), tuner in launch.tuners.items()]
    assert len(measured) == sum(runs)
    json.dumps([list(tuner.cache) for tuner in launch.tuners.values()])  # as Triton keeps them on disk
    last = configs.CANDIDATES["dense"][-1]
    (best,) = next(tuner for (name, _), tuner in launch.tuners.items() if name == "dense").cache.values()
    assert best.kwargs["BLOCK_K"] == last["BLOCK_K"] and best.num_warps == last["num_warps"]


def test_counts_of_tokens_share_a_configuration() -> None:
    assert [configs.tokens_bucket(n) for n in (9, 16, 17, 300, 1024, 5000)] == [16, 16, 32, 512, 1024, 1024]
