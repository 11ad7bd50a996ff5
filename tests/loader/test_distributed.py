"""Packed layers below DistributedDataParallel: parts are not sent, and what is trained on top of them is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import seedpack
from seedpack.codecs.seedlm import SeedLMCodec
from tests.helpers.models import ARCHITECTURES, Folders

CODECS: dict[str, dict[str, Any]] = {"trellis": {}, "seedlm": {"codec": SeedLMCodec(9, 8, 3)}, "svd": {"codec": "svd"}}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Embedding(30, 64), nn.Conv1d(3, 64, 5))


class Adapted(nn.Module):
    """A net with an adapter on top, as peft makes one."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.down, self.up = net.requires_grad_(False), nn.Linear(64, 4), nn.Linear(4, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x) + self.up(self.down(x))
        return y


@pytest.mark.parametrize("options", CODECS.values(), ids=CODECS.keys())
def test_trains_on_top_of_packed_layers(options: dict[str, Any], group: None, tmp_path: Path) -> None:
    seedpack.compress(layers(), tmp_path / "net.safetensors", **options)
    net = seedpack.load(tmp_path / "net.safetensors", model=layers())
    alone = Adapted(net[0])
    wrapped = DistributedDataParallel(alone)
    assert wrapped.parameters_to_ignore == {f"net.{name}" for name in net[0]._parameters if name != "bias"}
    x = torch.randn(5, 64)
    grads = torch.autograd.grad(alone(x).square().sum(), [*alone.down.parameters(), *alone.up.parameters()])
    wrapped(x).square().sum().backward()
    for parameter, grad in zip([*alone.down.parameters(), *alone.up.parameters()], grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    torch.optim.AdamW(wrapped.parameters()).step()
    everything = DistributedDataParallel(net.requires_grad_(False).append(nn.Linear(2, 2)))
    assert {name.rpartition(".")[0] for name in everything.parameters_to_ignore} == {"0", "1", "2"}
    assert not any(name.endswith(".bias") for name in everything.parameters_to_ignore)


def test_experts(group: None, tmp_path: Path) -> None:
    folders = Folders(ARCHITECTURES["mixtral"](), tmp_path)
    model = seedpack.load(folders.packed)
    wrapped = DistributedDataParallel(model)
    sent = {name for name, parameter in model.named_parameters() if parameter.is_floating_point() and parameter.numel()}
    ignored = wrapped.parameters_to_ignore
    assert ignored == {name for name, _ in model.named_parameters()} - sent and any(".experts." in n for n in ignored)


def _train(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)  # the adapters differ until they are sent
    net = Adapted(seedpack.load(f"{folder}/net.safetensors", model=nn.Linear(64, 64)))
    wrapped = DistributedDataParallel(net)
    wrapped(torch.randn(5, 64)).square().sum().backward()
    torch.save({name: parameter.grad for name, parameter in net.named_parameters()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    seedpack.compress(nn.Linear(64, 64), tmp_path / "net.safetensors", codec="seedlm")
    spawn(_train, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in ("down.weight", "up.bias"))
    assert first["net.packed"] is None
