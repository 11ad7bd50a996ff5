from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import seedpack
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.calibration import moments
from seedpack.converter.calibration.moments import InputMoments, layer_input
from seedpack.converter.sources.module import module_kind
from seedpack.errors import CodecError, ModelError


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.c(torch.relu(self.a(x) + self.b(x)))
        return y


def test_means_over_batches_and_shared_inputs() -> None:
    net, batches = Two(), [torch.randn(5, 6), torch.randn(2, 7, 6)]
    found = moments.run(net, batches, torch.device("cpu"))
    x = torch.cat([batch.reshape(-1, 6) for batch in batches])
    torch.testing.assert_close(found["a.weight"], x.T @ x / len(x))
    assert found["b.weight"] is found["a.weight"] and "unused.weight" not in found
    hidden = torch.relu(net.a(x) + net.b(x))
    torch.testing.assert_close(found["c.weight"], hidden.T @ hidden / len(x))
    assert net.training


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 5, (3, 2), stride=2, padding=1, dilation=(1, 2)), (2, 3, 9, 8)),
        (nn.Conv1d(4, 6, 3, padding=2, dilation=2), (2, 4, 11)),
        (nn.Linear(7, 3), (2, 5, 7)),
    ],
    ids=["conv2d", "conv1d", "linear"],
)
def test_rows_of_the_matrix_times_what_a_layer_sees_are_its_output(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), layer.get_parameter("weight")
    kind = module_kind({"layer": layer}, "layer.weight")[0]
    found = layer_input(layer, x) @ weight.flatten(1).T + layer.get_parameter("bias")
    expected = layer(x) if kind == "linear" else layer(x).flatten(2).mT
    torch.testing.assert_close(found, expected.reshape(-1, len(weight)), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_measured_is_left_out() -> None:
    layers = {
        "grouped": nn.Conv2d(4, 4, 3, groups=2),
        "same": nn.Conv2d(4, 4, 3, padding="same"),
        "table": nn.Embedding(3, 4),
    }
    with InputMoments(layers) as found:
        layers["grouped"](torch.randn(1, 4, 5, 5))
        layers["same"](torch.randn(1, 4, 5, 5))
        layers["table"](torch.zeros(2, dtype=torch.long))
    assert not found.means()


def test_batches_of_arguments_and_keywords() -> None:
    net, x = Two(), torch.randn(5, 6)
    by = [moments.run(net, [batch], torch.device("cpu"))["a.weight"] for batch in (x, (x,), {"x": x})]
    assert torch.equal(by[0], by[1]) and torch.equal(by[0], by[2])


def test_convolutions_of_one_input_that_see_it_otherwise() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(4, 8, 1, 2), nn.Conv2d(4, 8, 3, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.one(x).mean() + self.two(x).mean() + self.three(x).mean()
            return y

    found = moments.run(Block(), [torch.randn(2, 4, 8, 8)], torch.device("cpu"))
    assert [len(found[f"{name}.weight"]) for name in ("one", "two", "three")] == [36, 4, 36]
    assert not torch.allclose(found["one.weight"], found["three.weight"])


def test_no_batches_and_dead_inputs(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with pytest.raises(ModelError, match="were there batches"):
        moments.run(net, iter(()), torch.device("cpu"))
    for batch in (torch.randn(4, 7), (), {"y": torch.randn(4, 64)}):
        with pytest.raises(
            ModelError, match="calibration: Sequential cannot run on batch 1 .*pass what its forward takes"
        ):
            moments.run(net, [torch.randn(4, 64), batch], torch.device("cpu"))
    with torch.no_grad():
        net[0].bias.fill_(-1e3)  # type: ignore[operator]
    report = seedpack.compress(
        net, tmp_path / "out", codec=TrellisCodec(3, effort="fast"), calibration=[torch.randn(9, 64)]
    )
    assert len(report.tensors) == 2
    for hessian, message in ((-torch.eye(64), "2.weight: .* its diagonal positive"), (torch.eye(64) - 2, "2.weight: ")):
        with pytest.raises((CodecError, ModelError), match=message):
            seedpack.compress(
                net, tmp_path / "bad", codec=TrellisCodec(3, effort="fast"), importance={"2.weight": hessian}
            )
