"""compress, load, save, unpack on modules and state dicts; and all the input that is not as it should be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import seedpack
from seedpack.api import unpack
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.errors import FormatError, ModelError, NonfiniteError, NotPackedError, OutputError
from seedpack.formats import Checkpoint
from tests.helpers.nets import OddNet

CODEC = SeedLMCodec(10, 8, 3)


@pytest.mark.parametrize("codec", [CODEC, SVDCodec(rank=3), SVDCodec.over(CODEC, rank=4)], ids=lambda c: c.id)
def test_round_trips(net: OddNet, ids: torch.Tensor, tmp_path: Path, codec: seedpack.Codec) -> None:
    path = tmp_path / "net.safetensors"
    report = seedpack.compress(net, path, codec=codec)
    assert report.file_bytes == path.stat().st_size and len(report.tensors) == 5
    dense = seedpack.load(path, dense=True)
    reference = OddNet().eval()
    reference.load_state_dict(dense)
    packed = seedpack.load(path, model=OddNet()).eval()
    assert type(packed.fc).__name__ == "PackedLinear"
    torch.testing.assert_close(packed(ids), reference(ids), rtol=1e-5, atol=1e-5)
    seedpack.save(packed, tmp_path / "again.safetensors")
    with Checkpoint(path) as a, Checkpoint(tmp_path / "again.safetensors") as b:
        assert a.manifest.tensors.keys() == b.manifest.tensors.keys()
        for name in a.manifest.tensors:
            assert {p: bytes(x.data) for p, x in a.parts(name).items()} == {
                p: bytes(x.data) for p, x in b.parts(name).items()
            }
    unpack(path, tmp_path / "dense.safetensors")
    assert all(torch.equal(t, dense[n]) for n, t in load_file(tmp_path / "dense.safetensors").items())
    error = sum(float((dense[t.plan.name] - net.state_dict()[t.plan.name]).square().sum()) for t in report.tensors)
    assert error == pytest.approx(sum(t.error for t in report.tensors), rel=1e-4)


def test_same_input_same_bytes(net: OddNet, tmp_path: Path) -> None:
    for name in ("a", "b"):
        seedpack.compress(net, tmp_path / name, codec=CODEC)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_report_is_json(net: OddNet, tmp_path: Path) -> None:
    import json

    document = json.loads(json.dumps(seedpack.compress(net, tmp_path / "a", codec=CODEC).to_json()))
    assert document["packed_tensors"] == 5 and document["tensors_packed"]["fc.weight"]["error_db"] < -5


def test_wrapped_names(net: OddNet, tmp_path: Path) -> None:
    seedpack.compress({f"module.{n}": t for n, t in net.state_dict().items()}, tmp_path / "a", codec=CODEC)
    assert isinstance(seedpack.load(tmp_path / "a", model=OddNet()), OddNet)


def test_importance_is_used(tmp_path: Path) -> None:
    layer = nn.Linear(32, 64, bias=False)
    h = torch.rand(32) * 10 + 0.01
    errors = []
    for importance in (None, {"weight": h}):
        seedpack.compress(layer, tmp_path / "a", codec=CODEC, importance=importance, force=True)
        weight = seedpack.load(tmp_path / "a", dense=True)["weight"]
        errors.append(float((h * (weight - layer.weight.detach()) ** 2).sum()))
    assert errors[1] < 0.9 * errors[0]
    with pytest.raises(ModelError, match="importance is given for 'x'; no such tensor in the model"):
        seedpack.compress(layer, tmp_path / "b", codec=CODEC, importance={"x": h})


def test_layers_that_cannot_stay_packed_become_dense(tmp_path: Path) -> None:
    attention = nn.MultiheadAttention(16, 2)
    seedpack.compress(attention.state_dict(), tmp_path / "a", codec=CODEC)  # by name, out_proj.weight looks packable
    loaded = seedpack.load(tmp_path / "a", model=nn.MultiheadAttention(16, 2))
    assert loaded.out_proj.weight.shape == (16, 16) and loaded.out_proj.weight.is_floating_point()
    x = torch.randn(3, 1, 16)
    assert torch.isfinite(loaded(x, x, x)[0]).all()


def test_tied_layers_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.embed.weight

    seedpack.compress(Tied(), tmp_path / "a", codec=CODEC)
    with Checkpoint(tmp_path / "a") as checkpoint:
        assert list(checkpoint.manifest.tensors) == ["embed.weight"]
        assert checkpoint.manifest.shared == {"head.weight": "embed.weight"}
    loaded = seedpack.load(tmp_path / "a", model=Tied())
    assert loaded.head.packed is loaded.embed.packed and loaded.head.codes is loaded.embed.codes
    dense = seedpack.load(tmp_path / "a", dense=True)
    assert torch.equal(loaded.head.dense_weight(), dense["head.weight"])
    assert torch.equal(dense["embed.weight"], dense["head.weight"])
    seedpack.save(loaded, tmp_path / "b")
    with Checkpoint(tmp_path / "b") as checkpoint:
        assert checkpoint.manifest.shared == {"head.weight": "embed.weight"}


def test_kept_raw(tmp_path: Path) -> None:
    state = {
        "w.weight": torch.randn(8, 8), "steps": torch.tensor(7), "mask": torch.tensor([True, False]),
        "empty.weight": torch.zeros(0, 4), "half": torch.randn(3).half(), "double.weight": torch.randn(6, 8).double(),
    }  # fmt: skip
    seedpack.compress(state, tmp_path / "a", codec=CODEC)
    dense = seedpack.load(tmp_path / "a", dense=True)
    assert {n: (t.dtype, t.shape) for n, t in dense.items()} == {n: (t.dtype, t.shape) for n, t in state.items()}
    assert all(torch.equal(dense[n], state[n]) for n in ("steps", "mask", "empty.weight", "half"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_weights(tmp_path: Path, bad: float) -> None:
    state = {"a.weight": torch.randn(8, 8), "b.weight": torch.randn(8, 8), "c.bias": torch.tensor([bad])}
    state["b.weight"][3, 3] = bad
    with pytest.raises(NonfiniteError, match=r"NaN or Inf .* in 1 tensor: b.weight; .* --allow-nonfinite"):
        seedpack.compress(state, tmp_path / "a", codec=CODEC)
    assert not list(tmp_path.iterdir())
    report = seedpack.compress(state, tmp_path / "a", codec=CODEC, allow_nonfinite=True)
    assert [t.plan.name for t in report.tensors] == ["a.weight"]
    torch.testing.assert_close(
        seedpack.load(tmp_path / "a", dense=True)["b.weight"],
        state["b.weight"],
        equal_nan=True,
        rtol=0,
        atol=0,
    )


def test_empty_state_dict(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no tensors"):
        seedpack.compress({}, tmp_path / "a")


def test_output_exists(net: OddNet, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OutputError, match="exists already; pass --force"):
        seedpack.compress(net, tmp_path / "a", codec=CODEC)
    assert (tmp_path / "a").read_text() == "old"
    seedpack.compress(net, tmp_path / "a", codec=CODEC, force=True)
    assert os.listdir(tmp_path) == ["a"]


def test_output_is_the_model(net: OddNet, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "a.pt")
    with pytest.raises(ModelError, match="is the model itself"):
        seedpack.compress(tmp_path / "a.pt", tmp_path / "a.pt", force=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError("boom")])
def test_whatever_happens_the_old_output_stays(
    net: OddNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    (tmp_path / "a").write_text("old")
    calls = []

    def progress(stage: str, done: int, total: int, unit: str = "", item: str = "", /) -> None:
        calls.append(item)
        if len(calls) == 3:
            raise error

    with pytest.raises((KeyboardInterrupt, OutputError, RuntimeError)) as caught:
        seedpack.compress(net, tmp_path / "a", codec=CODEC, force=True, progress=progress)
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]
    if isinstance(error, OSError):
        assert "No space left on device; nothing was changed" in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: int) -> None:
    torch.save({"w.weight": torch.randn(2048, 1024)}, tmp_path / "net.pt")
    command = [sys.executable, "-m", "seedpack.cli", "compress", "net.pt", "-o", "out.safetensors"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell runs in its background
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert list(tmp_path.glob(".out*")), "it is at work"
    process.send_signal(number)
    _, message = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else 143), message
    assert os.listdir(tmp_path) == ["net.pt"]
    assert "Traceback" not in message


def test_wrong_targets(net: OddNet, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    seedpack.compress(net, path, codec=CODEC)
    other = OddNet()
    other.fc = nn.Linear(20, 34)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    for model, message in [
        (other, r"tensor 'fc.(bias|weight)': the file has shape \[33.*, the model \[34"),
        (nn.Linear(2, 2), "the file lacks 2 tensors of the model, such as 'bias'; the model lacks 10 tensors"),
    ]:
        with pytest.raises(ModelError, match=message):
            seedpack.load(path, model=model)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items()), "nothing was changed"
    with pytest.raises(ModelError, match="give the module to fill"):
        seedpack.load(path)
    with pytest.raises(FormatError, match="no such file or folder"):
        seedpack.load(tmp_path / "none")
    with pytest.raises(ModelError, match="option 'device_map' is for Hugging Face folders"):
        seedpack.load(path, dense=True, device_map="auto")


def test_plain_safetensors_is_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(
        NotPackedError, match="a.safetensors is not packed: .*; run seedpack compress .*a.safetensors first"
    ):
        seedpack.load(tmp_path / "a.safetensors", dense=True)


def test_packed_twice(net: OddNet, tmp_path: Path) -> None:
    seedpack.compress(net, tmp_path / "a.safetensors", codec=CODEC)
    with pytest.raises(ModelError, match="is packed by seedpack already; seedpack unpack makes it dense"):
        seedpack.compress(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_resnet20(data: Any, tmp_path: Path) -> None:
    """A real checkpoint: convolutions, batch norms, the names of a wrapped module."""
    report = seedpack.compress(data("resnet-cifar10/resnet20-12fca82f.th"), tmp_path / "a", codec=SeedLMCodec(12, 8, 3))
    assert report.plan.totals()["packed_tensors"] == 20 and report.error_db < -14
    specification = __import__("importlib.util").util.spec_from_file_location(
        "resnet", data("resnet-cifar10/resnet.py")
    )
    resnet = __import__("importlib.util").util.module_from_spec(specification)
    specification.loader.exec_module(resnet)
    model = seedpack.load(tmp_path / "a", model=resnet.resnet20()).eval()
    dense = resnet.resnet20().eval()
    dense.load_state_dict({n.removeprefix("module."): t for n, t in seedpack.load(tmp_path / "a", dense=True).items()})
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        model(x), dense(x), rtol=1e-4, atol=1e-4
    )  # the head's product is summed in another order


def test_activations_of_8_bits(net: OddNet, ids: torch.Tensor, tmp_path: Path) -> None:
    seedpack.compress(net, tmp_path / "a", codec="trellis", settings={"effort": "fast"})
    plain = seedpack.load(tmp_path / "a", model=type(net)()).eval()(ids)
    rounded = seedpack.load(tmp_path / "a", model=type(net)(), int8_activations=True).eval()(ids)
    assert 0 < float(((plain - rounded).norm() / plain.norm()).detach()) < 0.05
    with pytest.raises(ModelError, match="dense tensors have no activations"):
        seedpack.load(tmp_path / "a", dense=True, int8_activations=True)
