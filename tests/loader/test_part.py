"""Parts take no arithmetic: an average of equal parts changes nothing, anything else is refused in one sentence."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn

import seedpack
from seedpack.errors import ModelError
from seedpack.loader.part import Part
from tests.loader.test_layers import CASES, packed_and_dense

READ_ONLY = "a part of a packed weight is read-only"


def packed() -> Any:
    return nn.Sequential(packed_and_dense(CASES["linear"][0])[0], nn.LayerNorm(12))


def integers(model: nn.Module) -> list[Tensor]:
    return [value for value in model.parameters() if not value.is_floating_point()]


def set_data(target: Tensor, value: Tensor) -> None:
    target.data = value


AVERAGES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy_": lambda a, b: a.copy_(0.9 * a + 0.1 * b),
    "of data": lambda a, b: a.data.copy_(0.9 * a.data + 0.1 * b.data),
    "detached": lambda a, b: a.detach().copy_(0.9 * a + 0.1 * b),
    "data": lambda a, b: set_data(a, 0.9 * a + 0.1 * b),
    "in half": lambda a, b: a.copy_((0.9 * a.bfloat16() + 0.1 * b.bfloat16()) if not a.is_floating_point() else b),
    "items": lambda a, b: a.__setitem__(slice(None), 0.9 * a + 0.1 * b),
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES.keys())
@pytest.mark.parametrize("names", ["parameters", "state dict"])
def test_averages_by_hand(average: Any, names: str) -> None:
    model = packed()
    averaged, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    pairs = (
        zip(averaged.parameters(), model.parameters(), strict=True)
        if names == "parameters"
        else zip(averaged.state_dict().values(), model.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        for a, b in pairs:
            average(a, b)
    torch.testing.assert_close(averaged.state_dict(), before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"avg_fn": get_ema_avg_fn(0.99)},
        {"avg_fn": get_swa_avg_fn()},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        {"avg_fn": lambda a, b, n: 0.9 * a + 0.1 * b},
    ],
    ids=["default", "ema", "swa", "foreach ema", "own"],
)
def test_averages_of_torch_follow_what_is_trained(how: Any) -> None:
    model = packed()
    averaged = AveragedModel(model, **how)
    for step in range(4):
        with torch.no_grad():
            model[1].weight.fill_(float(step))
        averaged.update_parameters(model)
    assert 0 < averaged.module.get_parameter("1.weight")[0] < 3
    for a, b in zip(integers(averaged.module), integers(model), strict=True):
        assert torch.equal(a, b)


def test_a_soup_of_state_dicts() -> None:
    model = packed()
    other = copy.deepcopy(model)
    soup = {name: 0.3 * value + 0.7 * model.state_dict()[name] for name, value in model.state_dict().items()}
    other.load_state_dict(soup)
    assert torch.equal(other[0].packed, model[0].packed)
    with pytest.raises(RuntimeError, match=READ_ONLY):
        other.load_state_dict({name: value + 1.0 for name, value in soup.items()})
    with pytest.raises(RuntimeError, match=READ_ONLY):
        other.load_state_dict(soup, assign=True)
    assert torch.equal(other[0].packed, model[0].packed)


def test_parameters_as_a_vector() -> None:
    model = packed()
    before = copy.deepcopy(model.state_dict())
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "other floats": lambda part: part.copy_(part + 1.0),
    "NaN": lambda part: part.copy_(torch.full_like(part, torch.nan, dtype=torch.float32)),
    "zeros": lambda part: part.data.zero_(),
    "fill": lambda part: nn.init.constant_(part, 0.5),
    "noise": lambda part: part.detach().normal_(),
    "sums": lambda part: part.__iadd__(1),
    "products": lambda part: part.mul_(0.9),
    "mask": lambda part: part.masked_fill_(part > 0, 0),
    "item": lambda part: part.data.__setitem__((0, 0), 1.5),
    "data": lambda part: set_data(part, torch.zeros(part.shape)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_other_values_are_refused(write: Any) -> None:
    part = packed()[0].packed
    before = part.clone()
    with torch.no_grad(), pytest.raises(ModelError, match=READ_ONLY):
        write(part)
    assert torch.equal(part, before)


def test_parts_stay_parts(tmp_path: Any) -> None:
    model = packed()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    ways = {
        "made": model,
        "copy": copy.deepcopy(model),
        "pickled": torch.load(file, weights_only=False),
        "cast": copy.deepcopy(model).half().to("cpu"),
        "moved": copy.deepcopy(model).to("meta"),
        "emptied": copy.deepcopy(model).to("meta").to_empty(device="cpu"),
    }
    given = copy.deepcopy(model)
    given.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    ways["assigned"] = given
    seedpack.save(model, tmp_path / "packed.safetensors")
    empty = nn.Sequential(nn.Linear(20, 12), nn.LayerNorm(12))
    ways["loaded"] = seedpack.load(tmp_path / "packed.safetensors", model=empty)
    for way, result in ways.items():
        assert all(isinstance(value, Part) for value in integers(result)), way
        assert integers(result), way


def test_a_state_dict_is_a_file_of_plain_tensors() -> None:
    state = packed().state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    torch.testing.assert_close(dict(torch.load(file, weights_only=True)), dict(state), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(state), state, rtol=0, atol=0)
