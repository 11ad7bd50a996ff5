from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import seedpack
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.converter.plan import codec_for, default_plan
from seedpack.converter.sources.base import SourceTensor
from seedpack.errors import CodecError, FormatError, ModelError, OptionError

TENSORS = {
    "fc.weight": SourceTensor("F32", (32, 64), "linear"),
    "fc.bias": SourceTensor("F32", (32,)),
    "conv1d.weight": SourceTensor("BF16", (64, 32), "linear", transposed=True),
    "steps": SourceTensor("I64", ()),
    "tiny.weight": SourceTensor("F16", (3, 2), "linear"),
    "f8.weight": SourceTensor("F8_E4M3", (32, 64), "linear"),
}


def test_default_plan() -> None:
    plan = default_plan(TENSORS, {"tied.weight": "fc.weight"}, SeedLMCodec())
    found = {t.name: t.codec.id for t in plan.tensors}
    assert found == {
        "fc.weight": "seedlm", "fc.bias": "raw", "conv1d.weight": "seedlm", "steps": "raw", "tiny.weight": "raw",
        "f8.weight": "raw",
    }  # fmt: skip
    notes = {t.name: t.note for t in plan.tensors}
    assert notes["steps"] == "not a float tensor" and notes["fc.bias"] == "no matrix"
    assert notes["tiny.weight"].startswith("seedlm would take 17.")
    conv1d = next(t for t in plan.tensors if t.name == "conv1d.weight")
    assert conv1d.codec_shape == (32, 64) and conv1d.for_writer().transposed
    totals = plan.totals()
    assert totals["packed_weights"] == 4096 and totals["source_bytes"] == 4 * 2048 + 128 + 2 * 2048 + 8 + 12 + 2048
    assert totals["stored_bytes"] == sum(t.stored_bytes for t in plan.tensors)


def test_patterns_and_dtype() -> None:
    plan = default_plan(TENSORS, {}, SeedLMCodec(), include=["fc.*", "conv*"], exclude=["*1d*"], dtype="BF16")
    assert [t.name for t in plan.tensors if t.packed] == ["fc.weight"]
    assert {t.name: t.dtype for t in plan.tensors} == {
        "fc.weight": "BF16", "fc.bias": "BF16", "conv1d.weight": "BF16", "steps": "I64", "tiny.weight": "BF16",
        "f8.weight": "F8_E4M3",
    }  # fmt: skip
    with pytest.raises(ModelError, match="pattern 'layers.*' matches no tensor; names look like 'fc.weight'"):
        default_plan(TENSORS, {}, SeedLMCodec(), exclude=["layers.*"])


def test_plan_files(tmp_path: Path) -> None:
    plan = default_plan(TENSORS, {}, SeedLMCodec())
    document = json.loads(plan.dumps())
    assert plan.edited(document) == plan.edited(plan.to_json()) and plan.edited(document).to_json() == plan.to_json()
    document["tensors"]["fc.weight"] = {"codec": "svd", "config": SVDCodec(rank=3).spec().config}
    document["tensors"]["conv1d.weight"] = {"codec": "raw", "config": {"dtype": "BF16"}}
    del document["tensors"]["tiny.weight"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    codecs = {t.name: t.codec for t in plan.edited_by_file(path).tensors}
    assert codecs["fc.weight"] == SVDCodec(rank=3) and codecs["conv1d.weight"] == RawCodec("BF16")


def test_raw_needs_no_settings() -> None:
    plan = default_plan(TENSORS, {}, SeedLMCodec())
    edited = plan.edited({"seedpack_plan": 1, "tensors": {"fc.weight": {"codec": "raw"}}})
    assert [tensor.packed for tensor in edited.tensors if tensor.name == "fc.weight"] == [False]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "expected a plan of version 1"),
        ({"seedpack_plan": 2}, "expected a plan of version 1"),
        ({"seedpack_plan": 1, "tensors": []}, "'tensors' must be an object"),
        ({"seedpack_plan": 1, "tensors": {"x": {}}}, "names 1 tensor that the model does not have, such as 'x'"),
        (
            {"seedpack_plan": 1, "tensors": {"fc.weight": {"codec": "svd"}}},
            "expected codec and config, or raw alone",
        ),
        (
            {
                "seedpack_plan": 1,
                "tensors": {"fc.bias": {"codec": "svd", "config": SVDCodec(rank=1).spec().config}},
            },
            "'fc.bias' cannot be packed: no matrix",
        ),
    ],
)
def test_wrong_plans(document: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        default_plan(TENSORS, {}, SeedLMCodec()).edited(document)


def test_unreadable_plan_file(tmp_path: Path) -> None:
    plan = default_plan(TENSORS, {}, SeedLMCodec())
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        plan.edited_by_file(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        plan.edited_by_file(tmp_path / "bad.json")


def test_codec_of_the_command_line() -> None:
    assert codec_for("seedlm", None, {}) == SeedLMCodec()
    assert codec_for("seedlm", 3.0, {}) == SeedLMCodec(16, 12, 4)
    assert codec_for("seedlm", None, {"seed_bits": 12, "block": 4, "rank": 2}) == SeedLMCodec(12, 4, 2)
    assert codec_for("svd", None, {}) == SVDCodec(bits=4.0)
    assert codec_for("svd", None, {"rank": 7}) == SVDCodec(rank=7)
    assert codec_for("svd+seedlm", 6.0, {"seed": 3}) == SVDCodec.over(SeedLMCodec(), bits=6.0, seed=3)
    for name, bits, settings, message in [
        ("seedlm+svd", None, {}, "only svd takes another codec"),
        ("raw", 4.0, {}, "codec 'raw' does not take bits"),
        ("seedlm", None, {"colour": 1}, "has no setting 'colour'; it has: seed_bits, block"),
    ]:
        with pytest.raises(CodecError, match=message):
            codec_for(name, bits, settings)


def test_bits_beside_a_codec_that_is_given_are_refused() -> None:
    with pytest.raises(OptionError, match="bits are those of the codec that is given"):
        seedpack.plan(nn.Linear(64, 64), codec=SeedLMCodec(9, 8, 3, 1), bits=2)
