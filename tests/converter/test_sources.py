from __future__ import annotations

import json
import os
import pickle  # noqa: TID251
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import seedpack
from seedpack.converter.sources.few_bits import blocks_of
from seedpack.converter.sources.open import open_source
from seedpack.errors import FormatError, ModelError
from tests.helpers.few_bits import float8_blocks, spread_blocks
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
        ("no-such-org/no-such-model", "as a hub id it cannot be fetched"),
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

    def __call__(self, stage: str, done: int, *_: object) -> None:
        if self._change is not None and stage == "Fitting" and done:
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


def few_bits() -> dict[str, torch.Tensor]:
    stored, scale = float8_blocks(torch.randn(40, 48))
    return {"a.weight": stored, "a.weight_scale_inv": scale, "a.input_scale": torch.ones(()), "a.bias": torch.randn(40)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
def test_float8_with_its_scales_is_made_dense(tmp_path: Path, suffix: str) -> None:
    stored = few_bits()
    path = tmp_path / f"x{suffix}"
    save_file(stored, path) if suffix == ".safetensors" else torch.save(stored, path)
    source = open_source(path if suffix else stored)
    weight, scale = stored["a.weight"], stored["a.weight_scale_inv"]
    dense = (weight.float() * spread_blocks(scale, weight.shape, 16)).bfloat16()
    assert set(source.tensors) == {"a.weight", "a.bias"} and source.dropped == ["a.input_scale"]
    tensor = source.tensors["a.weight"]
    assert (tensor.dtype, tensor.kind, tensor.source_bytes) == ("BF16", "linear", weight.nbytes + scale.nbytes)
    assert torch.equal(source.read("a.weight"), dense)
    assert source.notes == ["float8 (blocks of 16x16), dequantised to BF16"]
    seedpack.compress(source, tmp_path / "few", codec="svd", settings={"rank": 2})
    seedpack.compress(
        {"a.weight": dense, "a.bias": stored["a.bias"]}, tmp_path / "dense", codec="svd", settings={"rank": 2}
    )
    assert (tmp_path / "few").read_bytes() == (tmp_path / "dense").read_bytes()


def test_float8_without_any_scale_is_float8() -> None:
    source = open_source(
        {"a.weight": torch.randn(8, 8).to(torch.float8_e4m3fn), "a.scale": torch.ones(8), "k_scale": torch.ones(())}
    )
    assert not source.notes and not source.dropped and source.tensors["a.weight"].dtype == "F8_E4M3"


FEW_FORMS: dict[str, tuple[dict[str, torch.Tensor], Callable[[dict[str, torch.Tensor]], torch.Tensor]]] = {
    "stacked experts": (
        {"w": torch.randn(3, 4, 8).to(torch.float8_e5m2), "w_scale_inv": torch.rand(3, 2, 2)},
        lambda s: s["w"].float() * s["w_scale_inv"].repeat_interleave(2, 1).repeat_interleave(4, 2),
    ),
    "a scale per expert": (
        {"w": torch.randn(3, 4, 8).to(torch.float8_e4m3fn), "w_scale": torch.rand(3)},
        lambda s: s["w"].float() * s["w_scale"][:, None, None],
    ),
    "powers of two": (
        {"w": torch.randn(4, 64).to(torch.float8_e4m3fn), "w_scale": torch.randint(100, 150, (4, 2), dtype=torch.uint8)},
        lambda s: s["w"].float() * torch.exp2(s["w_scale"].float() - 127).repeat_interleave(32, 1),
    ),
    "zero points": (
        {"weight": torch.randint(-9, 9, (4, 8), dtype=torch.int8), "weight_scale": torch.rand(4, 1), "weight_zero_point": torch.arange(4)[:, None]},
        lambda s: (s["weight"].float() - s["weight_zero_point"]) * s["weight_scale"],
    ),
    "beside the weight": (
        {"w.weight": torch.randn(4, 8).to(torch.float8_e4m3fn), "w.scale": torch.rand(1, 2).to(torch.float8_e8m0fnu)},
        lambda s: s["w.weight"].float() * s["w.scale"].float().repeat_interleave(4, 1),
    ),
    "one row": (
        {"w": torch.randn(6).to(torch.float8_e4m3fn), "w_scale": torch.rand(3)},
        lambda s: s["w"].float() * s["w_scale"].repeat_interleave(2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FEW_FORMS)
def test_forms_of_scales(form: str) -> None:
    stored, expected = FEW_FORMS[form]
    assert torch.equal(open_source(stored).read(next(iter(stored))), expected(stored).bfloat16())


def test_few_bits_under_several_names() -> None:
    stored = few_bits()
    names = {"b.weight": "a.weight", "b.weight_scale_inv": "a.weight_scale_inv", "c.weight": "a.weight"}
    stored |= {name: stored[first] for name, first in names.items()} | {"c.weight_scale_inv": torch.ones(3, 3)}
    source = open_source(stored)
    assert source.shared == {"b.weight": "a.weight"} and list(source.tensors) == ["a.weight", "a.bias", "c.weight"]
    assert torch.equal(source.read("c.weight"), stored["a.weight"].bfloat16())


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_must_be_finite(scale: float) -> None:
    stored = few_bits()
    stored["a.weight_scale_inv"][1, 2] = scale
    with pytest.raises(
        ModelError, match=r"'a.weight_scale_inv': 1 of 9 scales are NaN or Inf, expected finite ones; fetch"
    ):
        open_source(stored).read("a.weight")


U8, I32 = torch.zeros(2, 4, 3, 16, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int32)
ONES = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"b.weight": ONES.to(torch.float8_e5m2)}, "'b.weight': is F8_E5M2 without a scale, as are 0 more; expected 'b.weight_scale"),
        ({"b.weight": ONES.to(torch.float8_e5m2), "b.weight_scale": torch.ones(3, 1)}, "scale': has shape .3, 1. for 'b.weight' .4, 4., exp"),
        ({"b.weight": ONES.to(torch.int8), "b.weight_scale": ONES, "b.weight_zero_point": torch.ones(2)}, "expected that of 'b.weight_scale'"),
        ({"b.weight": ONES.to(torch.int8), "b.weight_scale": ONES.int()}, "is I32, expected one of BF16, F16, F32, F64 as the scale"),
        ({"b_blocks": U8}, "'b_blocks': is MXFP4 without its scales, expected 'b_scales' beside it"),
        ({"b_blocks": U8[0]}, r"'b_blocks': has shape .4, 3, 16., expected .experts, out, groups, 16."),
        ({"b_blocks": U8, "b_scales": U8[:, :, :, 0], "b": ONES}, "'b_blocks': stands beside 'b', the same weight"),
        ({"b_blocks": U8, "b_scales": U8[:, :, 0, 0]}, "'b_scales': is U8 .2, 4. for 'b_blocks' .2, 4, 3, 16., expected U8 .2, 4, 3."),
        ({"b.qweight": I32, "b.scales": ONES}, r"'b.qweight': is quantised already \(GPTQ or AWQ\); start from the dense model"),
        ({"b.weight_packed": I32}, r"is quantised already \(compressed-tensors, in packed integers or NVFP4\)"),
        ({"b.weight": U8, "b.weight.absmax": ONES}, r"is quantised already \(bitsandbytes, in 4 bits\)"),
        ({"b.weight": U8, "b.weight_scale": ONES}, r"is quantised already \(two weights of 4 bits per byte, as NVFP4\)"),
        ({"b.weight": ONES.to(torch.int8), "b.scale": ONES.to(torch.float8_e8m0fnu)}, "two weights of 4 bits per byte, as MXFP4"),
    ],
)  # fmt: skip
def test_few_bits_that_cannot_be_made_dense(extra: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_source(few_bits() | extra)


def test_exponents_must_be_numbers() -> None:
    stored = {"b_blocks": U8, "b_scales": torch.full((2, 4, 3), 255, dtype=torch.uint8)}
    with pytest.raises(ModelError, match="'b_scales': 24 of 24 scales are NaN or Inf"):
        open_source(stored).read("b")


def test_blocks_follow_from_shapes() -> None:
    assert blocks_of((576, 7168), (5, 56)) == blocks_of((576, 7168), (5, 56), [(64, 64), (128, 128)]) == (128, 128)
    assert blocks_of((96, 64), (2, 1), [(48, 64)]) == (48, 64) and blocks_of((96, 64), (2, 1)) == (64, 64)
    assert blocks_of((100, 30), (5, 3)) == (20, 10) and blocks_of((8, 4), (8,)) == (1, 4)
    assert blocks_of((256, 256), (1, 1), [(128, 128)]) is None and blocks_of((4, 4), (5, 1)) is None
    assert blocks_of((4, 4), (1, 1, 1)) is None and blocks_of((4, 4, 4), (2, 1, 1)) is None


def test_few_bits_replaced_midway_are_refused(tmp_path: Path) -> None:
    path, stored = tmp_path / "x.safetensors", few_bits()
    save_file(stored, path)
    change = Midway(lambda: save_file(stored | {"a.weight_scale_inv": torch.ones(3, 3)}, path))
    with pytest.raises(ModelError, match="tensor 'a.weight' changed while the model was being read"):
        seedpack.compress(path, tmp_path / "out", codec="trellis", settings={"effort": "fast"}, progress=change)


def test_a_compressed_archive(tmp_path: Path) -> None:
    """Is refused before it is read: of 66 kB it would make 67 MB."""
    torch.save({"w": torch.zeros(1024, 1024)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "net.pt", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in plain.namelist():
            deflated.writestr(name, plain.read(name))
    with pytest.raises(ModelError, match="is compressed, which torch.save never does"):
        open_source(tmp_path / "net.pt")
