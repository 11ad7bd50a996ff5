"""Budgets by what the packed model is measured to lose."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seedpack
from seedpack import Calibration
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.calibration import layerwise, measuring, packed
from seedpack.hf.internals import decoder_layers
from seedpack.hf.own_text import generate_tokens
from tests.helpers.marks import slow
from tests.helpers.models import ARCHITECTURES
from tests.helpers.plans import bits_of

FAST: dict[str, Any] = {"codec": "trellis", "settings": {"effort": "fast"}}


def telling_model(name: str = "llama-tied") -> Any:
    """A model whose predictions are not all alike."""
    model = ARCHITECTURES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
        model.get_input_embeddings().weight[0] = 0.1  # of padding, zero before: its norm would magnify any noise
    return model


def ids(count: int = 24, context: int = 16) -> Tensor:
    return torch.randint(3, 96, (count, context), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["llama-tied", *slow("llama", "qwen3")])
def test_shares_add_up_to_the_divergence(name: str) -> None:
    """Small errors: the divergence is quadratic in them. The share of one tensor is what it costs alone."""
    model = telling_model(name)
    text = generate_tokens(model, 4096, 32)
    packed, noisy = copy.deepcopy(model), {}
    with torch.no_grad():
        for parameter, value in packed.named_parameters():
            if value.dim() == 2:
                noisy[parameter] = f"{parameter} as a tensor"
                value.add_(0.02 * value.std() * torch.randn_like(value))
    pair = measuring.Pair(model, packed, list(decoder_layers(model)), noisy)
    told: list[int] = []
    found = measuring.shares(pair, text, told.append)
    whole = measuring.divergence(pair, text, lambda count: None)
    assert sum(told) == text.numel() and sum(found.values()) == pytest.approx(whole, rel=0.1)
    assert all(p.grad is None and p.requires_grad for p in [*model.parameters(), *packed.parameters()])
    loudest = max(noisy, key=lambda parameter: found[noisy[parameter]])
    alone = copy.deepcopy(model)
    with torch.no_grad():
        alone.get_parameter(loudest).copy_(packed.get_parameter(loudest))
    cost = measuring.divergence(measuring.Pair(model, alone, pair.layer_names, noisy), text, lambda count: None)
    assert found[noisy[loudest]] == pytest.approx(cost, rel=0.25)


def test_what_the_text_does_not_reach_has_no_share() -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"]().float()
    model.tower = nn.Linear(8, 8)
    packed = copy.deepcopy(model)
    names = {n: n for n, p in model.named_parameters() if p.dim() == 2}
    pair = measuring.Pair(model, packed, list(decoder_layers(model)), names)
    assert names.keys() - measuring.shares(pair, ids(), lambda count: None).keys() == {"tower.weight"}
    alone = measuring.Pair(model, packed, list(decoder_layers(model)), {"tower.weight": "tower.weight"})
    assert measuring.shares(alone, ids(), lambda count: None) == {}


def test_costs_are_for_an_error_of_1_and_never_nothing() -> None:
    found = measuring.costs({"a": 0.3, "b": -0.1, "c": 0.2}, {"a": (0.1, 100), "b": (0.5, 100), "c": (0.1, 200)})
    assert found == pytest.approx({"a": 3.0, "b": 0.1 * 0.1 / 0.5, "c": 2.0})


def test_sequences_to_compare_on_are_others() -> None:
    shared, compared = measuring.halves(ids(9))
    assert len(shared) == len(compared) == 4 and not torch.equal(shared, compared)
    assert len(measuring.halves(ids(1))[0]) == 1
    long = torch.zeros(64, 512, dtype=torch.int64)
    assert [part.numel() for part in measuring.halves(long)] == [measuring.TOKENS] * 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    telling_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_budget_follows_what_is_measured(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def progress(stage: str, done: int, total: int, unit: str = "", item: str = "") -> None:
        said.append(f"{stage}: {item}")

    options = FAST | {"bits": 3.1}
    by_sizes = seedpack.plan(folder, **options)
    measured = seedpack.compress(
        folder, tmp_path / "measured", calibration=Calibration(ids(), context=16), progress=progress, **options
    )
    (line,) = [line for line in said if "KL divergence" in line]
    words = line.replace(",", "").split()
    before, after = float(words[words.index("by") - 1]), float(words[words.index("sizes") + 1])
    assert line.endswith("these are followed") == (after < before)
    assert measured.plan.totals()["bits_per_packed_weight"] <= 3.1
    assert (bits_of(measured.plan) == bits_of(by_sizes)) == (after >= before)
    for layer in range(2):  # engines compute them as one
        found = {bits_of(measured.plan)[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv"}
        assert len(found) == 1


@pytest.mark.parametrize("lie", [True, False], ids=["a lie", "the truth"])
def test_it_steps_back_from_what_is_worse(
    folder: Path, tmp_path: Path, lie: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs that say the opposite, and those of a plan that is good already."""
    options = FAST | {"bits": 3.1}
    plain = seedpack.plan(folder, **options)
    costs = measuring.costs

    def opposite(found: Mapping[str, float], tensors: Mapping[str, tuple[float, int]]) -> dict[str, float]:
        return {name: 1 / cost for name, cost in costs(found, tensors).items()}

    found: list[float] = []
    divergence = measuring.divergence

    def watched(*args: Any) -> float:
        found.append(divergence(*args))
        return found[-1]

    monkeypatch.setattr(measuring, "divergence", watched)
    if lie:
        monkeypatch.setattr(measuring, "costs", opposite)
    report = seedpack.compress(folder, tmp_path / "packed", calibration=Calibration(ids(), context=16), **options)
    if lie:
        assert found[1] > found[0] and bits_of(report.plan) == bits_of(plain)
    else:
        assert not found or (found[1] < found[0]) == (bits_of(report.plan) != bits_of(plain))


@pytest.mark.parametrize("why", ["no room", "on disk", "a mixture", *slow("batches")])
def test_where_it_cannot_be_measured_sizes_decide(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> float:
        raise AssertionError

    monkeypatch.setattr(measuring, "shares", never)
    calibration: Any = Calibration(ids(), context=16)
    model = telling_model("mixtral" if why == "a mixture" else "llama-tied")
    model.save_pretrained(tmp_path / "model")
    if why == "no room":
        monkeypatch.setattr(packed, "free_bytes", lambda: 0)
    elif why == "on disk":
        monkeypatch.setattr(layerwise, "on_disk", lambda model: True)
    elif why == "batches":
        calibration = [{"input_ids": ids()}]
    said: list[str] = []
    report = seedpack.compress(
        tmp_path / "model", tmp_path / "packed", bits=3.5, calibration=calibration, **FAST,
        progress=lambda stage, done, total, unit="", item="": said.append(item),
    )  # fmt: skip
    assert bits_of(report.plan) == bits_of(seedpack.plan(tmp_path / "model", bits=3.5, **FAST))
    reason = {"a mixture": "a mixture of experts", "batches": ""}.get(why, "no room for both models")
    assert (f"the bits are spread by the sizes of tensors, not measured: {reason}" in said) == (why != "batches")


def test_in_sequence_plans_are_tried_at_the_effort_fast(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    efforts: list[str] = []
    encode = TrellisCodec.encode

    def noted(codec: TrellisCodec, *args: Any, **kwargs: Any) -> Any:
        efforts.append(codec.effort)
        return encode(codec, *args, **kwargs)

    monkeypatch.setattr(TrellisCodec, "encode", noted)
    seedpack.compress(folder, tmp_path / "packed", bits=3.1, calibration=Calibration(ids(), context=16))
    count = efforts.count("default")
    assert efforts[:count] == ["fast"] * count and efforts[-count:] == ["default"] * count
    efforts.clear()
    calibration = Calibration(ids(), context=16, sequential=False)
    seedpack.compress(folder, tmp_path / "plain", bits=3.1, calibration=calibration)
    assert "fast" not in efforts


def test_whole_bits_are_not_measured(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "shares", lambda *_: pytest.fail("measured"))
    report = seedpack.compress(folder, tmp_path / "packed", bits=3, calibration=Calibration(ids(), context=16), **FAST)
    assert set(bits_of(report.plan).values()) == {3, 4}  # the head has one more


@pytest.mark.parametrize("jobs", slow(2))
def test_workers_fit_both_plans(jobs: int, folder: Path, tmp_path: Path) -> None:
    options = FAST | {"bits": 3.1, "calibration": Calibration(ids(), context=16, sequential=False)}
    alone = seedpack.compress(folder, tmp_path / "alone", **options)
    together = seedpack.compress(folder, tmp_path / "together", jobs=jobs, **options)
    assert bits_of(alone.plan) == bits_of(together.plan)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "together")]
    assert files[0] == files[1]
