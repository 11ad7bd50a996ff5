"""Files and modules whose names differ by what wraps one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import seedpack
from seedpack.errors import ModelError
from seedpack.loader.wrapped import names_in_module
from tests.helpers.models import CODEC


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
        self.module = nn.Linear(32, 8)  # a name that wrappers have too

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(self.body(x))
        return y


def holder(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules)


def compiled_inside(net: Net) -> nn.Module:
    net.body = torch.compile(net.body)  # type: ignore[assignment]
    return net


WRAPPED: dict[str, Callable[[Net], nn.Module]] = {
    "bare": lambda net: net,
    "DataParallel": nn.DataParallel,
    "compiled": lambda net: torch.compile(net),  # type: ignore[dict-item, return-value]
    "compiled, then DataParallel": lambda net: nn.DataParallel(cast(Any, torch.compile(net))),
    "DataParallel, then compiled": lambda net: torch.compile(nn.DataParallel(net)),  # type: ignore[dict-item, return-value]
    "compiled inside": compiled_inside,
    "Lightning": lambda net: holder(net=net),
    "Lightning, compiled": lambda net: holder(model=torch.compile(net)),  # type: ignore[arg-type]
    "two prefixes": lambda net: holder(model=holder(net=net)),
}


OTHERWISE = {"Lightning", "Lightning, compiled", "two prefixes"}


@pytest.mark.parametrize("into", WRAPPED)
@pytest.mark.parametrize("of", WRAPPED)
def test_names(of: str, into: str) -> None:
    if len({of, into} & OTHERWISE) == 2:
        pytest.skip("different attributes on either side")
    stored, own = (list(WRAPPED[name](Net()).state_dict()) for name in (of, into))
    assert list(names_in_module(stored, own).values()) == own


@pytest.mark.parametrize(("of", "into"), [("Lightning, compiled", "bare"), ("compiled inside", "DataParallel"),
                                          ("bare", "two prefixes"), ("DataParallel", "compiled")])  # fmt: skip
def test_values(of: str, into: str, tmp_path: Path) -> None:
    net, x = Net().eval(), torch.randn(4, 32)
    state = {"state_dict": WRAPPED[of](net).state_dict(), "pytorch-lightning_version": "2.5.0", "epoch": 3}
    torch.save(state, tmp_path / "net.ckpt")
    seedpack.compress(tmp_path / "net.ckpt", tmp_path / "net.safetensors", codec=CODEC)
    filled: Any = Net().eval()
    seedpack.load(tmp_path / "net.safetensors", model=WRAPPED[into](filled))
    expected = Net().eval()
    seedpack.compress(net, tmp_path / "bare.safetensors", codec=CODEC)
    seedpack.load(tmp_path / "bare.safetensors", model=expected)
    assert type(filled.module).__name__ == "PackedLinear" and torch.equal(filled(x), expected(x))


def test_what_fits_in_no_way_stays() -> None:
    assert names_in_module(["a.x", "b.y"], ["x", "y"]) == {"a.x": "a.x", "b.y": "b.y"}
    assert names_in_module(["net.x", "loss.w"], ["x"])["net.x"] == "net.x"
    assert names_in_module(["module.x", "_orig_mod.x"], ["x"])["module.x"] == "module.x"
    assert names_in_module(["a.x"], ["a.x", "n.num_batches_tracked"]) == {"a.x": "a.x"}


def test_the_message_names_what_the_file_has(tmp_path: Path) -> None:
    seedpack.compress(
        {"net.fc.weight": torch.randn(32, 32), "loss.weight": torch.randn(4)}, tmp_path / "a", codec=CODEC
    )
    with pytest.raises(ModelError, match="the model lacks 2 tensors of the file, such as 'loss.weight'"):
        seedpack.load(tmp_path / "a", model=nn.ModuleDict({"fc": nn.Linear(32, 32)}))
