from __future__ import annotations

import json
import os
import pickle  # noqa: TID251
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import seedpack
from seedpack.converter.sources.open import open_source
from seedpack.errors import FormatError, ModelError
from tests.helpers.models import llama


def state() -> dict[str, torch.Tensor]:
    return {"fc.weight": torch.randn(4, 6), "fc.bias": torch.randn(4), "n": torch.tensor(3)}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin", ".ckpt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(tmp_path: Path, suffix: str, legacy: bool) -> None:
    path = tmp_path / f"net{suffix}"
    torch.save(state(), path, _use_new_zipfile_serialization=not legacy)
    source = open_source(path)
    assert list(source.tensors) == ["fc.weight", "fc.bias", "n"] and source.config is None
    assert torch.equal(source.read("n"), torch.tensor(3)) and source.tensors["fc.weight"].kind == "linear"


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_nested(tmp_path: Path, key: str) -> None:
    torch.save({key: OrderedDict(state()), "epoch": 3, "optimizer": {"lr": 1.0}}, tmp_path / "net.pt")
    source = open_source(tmp_path / "net.pt")
    assert set(source.tensors) == set(state()) and source.dropped == ["epoch", "optimizer"]


def test_code_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"x": Evil()}, tmp_path / "evil2.pt")
    for name in ("module.pt", "evil.pt", "evil2.pt"):
        with pytest.raises(ModelError, match=rf"{name}: refused, because .*torch.save\(model.state_dict\(\), …\)"):
            open_source(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a file written by torch.save"),
        (b"hello world", "not a file written by torch.save|refused"),
        (b"PK\x03\x04 not a zip", "not a file written by torch.save"),
    ],
)
def test_broken_torch_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        open_source(tmp_path / "x.pt")


def test_truncated_torch_file(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a file written by torch.save"):
        open_source(tmp_path / "x.pt")


def test_empty_and_wrong_contents(tmp_path: Path) -> None:
    for value, message in [
        ({}, "holds no tensors"),
        ([1], "holds a list, not a state dict"),
        ({"a": 1}, "holds no tensors"),
    ]:
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(ModelError, match=message):
            open_source(tmp_path / "x.pt")
    with pytest.raises(ModelError, match="entry 'a' is not a named tensor"):
        open_source({"a": 1})  # type: ignore[dict-item]


def test_safetensors(tmp_path: Path) -> None:
    tensors = {**state(), "empty": torch.empty(0, 3), "half": torch.randn(3, 3).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors")
    assert set(source.tensors) == set(tensors)
    assert all(torch.equal(source.read(n), t) and source.read(n).dtype == t.dtype for n, t in tensors.items())
    (tmp_path / "x.safetensors").write_bytes(b"12")
    with pytest.raises(FormatError, match="too short"):
        open_source(tmp_path / "x.safetensors")


def test_modules_know_their_layers(net: nn.Module) -> None:
    source = open_source(net)
    kinds = {name: t.kind for name, t in source.tensors.items() if t.kind}
    assert kinds == {
        "embed.weight": "embedding", "conv1.weight": "conv", "conv2.weight": "conv", "fc.weight": "linear",
        "out.weight": "linear",
    }  # fmt: skip
    attention = open_source(nn.MultiheadAttention(8, 2))
    assert {name for name, t in attention.tensors.items() if t.kind} == {"out_proj.weight"}


def test_shared_tensors_are_found() -> None:
    a = torch.randn(6, 4)
    source = open_source({"a": a, "b": a, "view": a[:3], "c": a.clone()})
    assert source.shared == {"b": "a"} and list(source.tensors) == ["a", "view", "c"]


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "folder").mkdir()
    missing: list[tuple[Path | str, str]] = [
        (tmp_path / "none.pt", "no such file or folder, and not a hub id"),
        (tmp_path / "x.txt", "unknown kind of file '.txt'; known:"),
        (tmp_path / "folder", "has no config.json"),
        ("no-such-org/no-such-model", "as a hub id it could not be had"),
    ]
    for path, message in missing:
        with pytest.raises(ModelError, match=message):
            open_source(path)


def folder_with(tmp_path: Path, config: object) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "expected a JSON object"),
        ({"quantization_config": {"quant_method": "awq"}}, "is quantised already \\(by awq\\)"),
        ({"model_type": "no-such-type"}, "cannot build this model"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 4,
          "num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 16}, "holds neither model.safetensors nor"),
    ],
)  # fmt: skip
def test_unusable_folders(tmp_path: Path, config: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_source(folder_with(tmp_path, config))


class Midway:
    """Changes a model's files once its first tensor has been fitted."""

    def __init__(self, change: Callable[[], object]):
        self._change: Callable[[], object] | None = change

    def __call__(self, *_: object) -> None:
        if self._change is not None:
            change, self._change = self._change, None
            change()


def written(path: Path, scale: float) -> None:
    tensors = {f"l{i}.weight": scale * torch.randn(32, 64) for i in range(4)}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("how", ["renamed", "written", "cut off"])
def test_a_source_replaced_midway_is_refused(tmp_path: Path, suffix: str, how: str) -> None:
    path, other = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    written(path, 1.0)
    written(other, 50.0)

    def change() -> None:
        if how == "renamed":
            other.rename(path)
        elif how == "written":
            path.write_bytes(other.read_bytes())
        else:
            os.truncate(path, 9000)

    options: dict[str, Any] = {"codec": "trellis", "settings": {"effort": "fast"}, "progress": Midway(change)}
    if (suffix, how) == ("pt", "renamed"):  # mapped into memory: the old file is read to its end
        seedpack.compress(path, tmp_path / "out", **options)
        assert max(float(w.std()) for w in seedpack.load(tmp_path / "out", dense=True).values()) < 2
        return
    with pytest.raises(ModelError, match=r"a\.(safetensors|pt).* changed while the model was being read; run again"):
        seedpack.compress(path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_only_touched_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written(path, 1.0)
    same = path.read_bytes()
    options: dict[str, Any] = {"codec": "trellis", "settings": {"effort": "fast"}}
    seedpack.compress(path, tmp_path / "out", progress=Midway(lambda: path.write_bytes(same)), **options)
    seedpack.compress(path, tmp_path / "again", progress=Midway(lambda: os.utime(path, (0, 0))), **options)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "again").read_bytes()


def test_a_config_replaced_midway_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    config = tmp_path / "dense" / "config.json"
    change = Midway(lambda: config.write_text(config.read_text() + " "))
    with pytest.raises(ModelError, match=r"config.json changed while the model was being read"):
        seedpack.compress(
            tmp_path / "dense", tmp_path / "out", codec="trellis", settings={"effort": "fast"}, progress=change
        )
