"""Tensors fitted by the workers of a Ray cluster, one of whose machines dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import seedpack
from seedpack.cli.main import cli
from seedpack.errors import BackendError, ModelError, NonfiniteError, OptionError
from tests.helpers.models import llama

pytestmark = pytest.mark.slow
OPTIONS: dict[str, Any] = {"codec": "trellis", "settings": {"effort": "fast"}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two raylets on this machine, of one core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def model(folder: Path, rows: int = 48) -> Path:
    state = {f"{i}.weight": torch.randn(rows + 16 * i, 256) for i in range(8)}
    torch.save({**state, "bias": torch.randn(7)}, folder / "net.pt")
    return folder / "net.pt"


def test_they_give_the_same_bytes(cluster: Any, tmp_path: Path) -> None:
    path, one, many = model(tmp_path), tmp_path / "one.safetensors", tmp_path / "many.safetensors"
    seedpack.compress(path, one, **OPTIONS)
    report = seedpack.compress(path, many, **OPTIONS, engine="ray", address=cluster.address)
    assert one.read_bytes() == many.read_bytes() and len(report.tensors) == 8


def test_the_command_finds_the_cluster(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, one, many = model(tmp_path), tmp_path / "one.safetensors", tmp_path / "many.safetensors"
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    for output, engine in ((one, []), (many, ["--engine", "ray"])):
        done = CliRunner().invoke(cli, ["compress", str(path), "-o", str(output), "--effort", "fast", *engine])
        assert done.exit_code == 0, done.output
    assert one.read_bytes() == many.read_bytes()


def test_layers_are_fitted_as_they_are_calibrated(cluster: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    ids, seen = torch.arange(128).reshape(4, 32) % 64, list[str]()
    options = {**OPTIONS, "calibration": seedpack.Calibration(ids, context=32, sequential=False)}

    def progress(stage: str, *rest: Any) -> None:
        if stage in ("Calibrating", "Fitting"):
            seen.append(stage)
        if stage == "Calibrating":
            time.sleep(3 if "Fitting" in seen else 10)  # a large model's layer takes longer, and workers start slowly

    seedpack.compress(tmp_path / "dense", tmp_path / "one" / "out", **options)
    many = tmp_path / "many" / "out"
    seedpack.compress(tmp_path / "dense", many, **options, engine="ray", address=cluster.address, progress=progress)
    assert (many / "model.safetensors").read_bytes() == (tmp_path / "one" / "out" / "model.safetensors").read_bytes()
    assert "Fitting" in seen[: len(seen) - seen[::-1].index("Calibrating")]


def test_a_machine_that_dies(cluster: Any, tmp_path: Path) -> None:
    """Its tensors are fitted elsewhere, and the bytes are the same."""
    path, output = model(tmp_path, 8192), tmp_path / "out.safetensors"
    node = cluster.add_node(num_cpus=2)
    done: list[str] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while not done and time.monotonic() < deadline:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    def progress(stage: str, count: int, total: int, unit: str = "", item: str = "", /) -> None:
        if stage == "Fitting" and item:
            done.append(item)

    thread = threading.Thread(target=kill)
    thread.start()
    seedpack.compress(path, output, **OPTIONS, engine="ray", address=cluster.address, progress=progress)
    thread.join()
    seedpack.compress(path, tmp_path / "whole.safetensors", **OPTIONS)
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_errors_are_those_of_the_run(cluster: Any, tmp_path: Path) -> None:
    path, ray = model(tmp_path), {"engine": "ray", "address": cluster.address}
    with pytest.raises(seedpack.SeedpackError, match="1.weight: .*importance"):
        seedpack.compress(path, tmp_path / "out.safetensors", **OPTIONS, **ray, importance={"1.weight": torch.ones(3)})
    state = torch.load(path)
    state["2.weight"][0, 0] = torch.nan
    torch.save(state, path)
    with pytest.raises(NonfiniteError, match="in 1 tensor: 2.weight"):
        seedpack.compress(path, tmp_path / "out.safetensors", **OPTIONS, **ray)
    with pytest.raises(ModelError, match="this one is in memory"):
        seedpack.compress(torch.nn.Linear(64, 64), tmp_path / "out.safetensors", **OPTIONS, **ray)
    assert not (tmp_path / "out.safetensors").exists()


def test_no_cluster(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no cluster to join"):
        seedpack.compress(model(tmp_path), tmp_path / "out", **OPTIONS, engine="ray", address="127.0.0.1:1")
    with pytest.raises(OptionError, match="choose the engine ray too"):
        seedpack.compress(model(tmp_path), tmp_path / "out", **OPTIONS, address="127.0.0.1:1")
