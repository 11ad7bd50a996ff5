"""One test for each numbered rule of docs/format.md."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from seedpack.api import compress, load
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.dtypes import to_bytes
from seedpack.errors import (
    CodecError,
    DigestError,
    FormatError,
    NotPackedError,
    OutputError,
    SeedpackError,
    UnknownCodecError,
    VersionError,
)
from seedpack.formats import Checkpoint, CheckpointWriter, PlannedTensor, View, staged
from seedpack.formats.header import DTYPE_BYTES, dumps_canonical, level_of
from seedpack.formats.manifest import loads_manifest
from seedpack.kernels.common.bits import pack, unpack
from seedpack.loader.dense import stored_dense
from seedpack.prng import (
    LFSR_TAPS,
    TRELLIS_MULTIPLIERS,
    lfsr_matrix,
    philox_words,
    rademacher,
    squirrel5,
    trellis_key,
    trellis_multiplier,
    trellis_values,
)
from tests.helpers import checkpoints as make

SPEC = (Path(__file__).resolve().parent.parent.parent / "docs" / "format.md").read_text()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make.write(tmp_path / "a.safetensors")


def refused(path: Path, message: str, kind: type[SeedpackError] = FormatError) -> None:
    with pytest.raises(kind, match=message) as caught, Checkpoint(path) as checkpoint:
        for name in checkpoint.manifest.tensors:
            stored_dense(checkpoint, name)
    assert str(path.name) in str(caught.value), "the message says which file"


def update(manifest: dict[str, Any], **changes: Any) -> None:
    manifest.update(changes)


def test_every_rule_has_a_test() -> None:
    rules = set(re.findall(r"^\*\*M(\d+)\.\*\*", SPEC, re.MULTILINE))
    assert rules == {name[6:8].lstrip("0") for name in globals() if re.match(r"test_m\d\d_", name)}
    assert len(rules) >= 20


def test_the_valid_file_is_accepted(file: Path) -> None:
    with Checkpoint(file) as checkpoint:
        assert [error for _, error in checkpoint.verify()] == [None, None]
        assert bytes(checkpoint.part("b", "weight").data) == make.contents(make.PLANNED[1])["weight"][2]


def test_m01_length_and_encoding(file: Path) -> None:
    data = file.read_bytes()
    for broken, message in [
        (b"", "0 bytes is too short"),
        (data[:7], "7 bytes is too short"),
        (data[:100], "does not fit a file of 100; the file is truncated"),
        ((2**63).to_bytes(8, "little") + data[8:], "at most 100000000 allowed"),
        (make.join(b"\xff{}", b""), "not UTF-8"),
        (make.join(" {}", b""), "must begin with '{'"),
    ]:
        file.write_bytes(broken)
        refused(file, message)


def test_m02_json(file: Path) -> None:
    header, body = make.split(file.read_bytes())
    text = json.dumps(header)
    for broken, message in [
        (text[:-1], "not valid JSON"),
        ('{"a":1,"a":1}', "duplicate key 'a'"),
        ('{"a":NaN}', "NaN is not JSON"),
        ("{" + '"a":{' * 100_000, "not valid JSON"),
        ('{"a":' + "[" * 64 + "]" * 64 + "}", "nested more than 64 deep"),
        ('{"a":3}', "expected exactly dtype, shape and data_offsets"),
        ('{"__metadata__":{"a":1}}', "must map strings to strings"),
        ('{"__metadata__":[]}', "must map strings to strings"),
        (json.dumps({**header, "b": {**header["b"], "more": 1}}), "'b': expected exactly dtype"),
    ]:
        file.write_bytes(make.join(broken, body))
        refused(file, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F12"}, "unknown dtype 'F12'"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"shape": [-5]}, "shape must be a list of whole numbers"),
        ({"shape": [5.0]}, "shape must be a list of whole numbers"),
        ({"shape": [2**62, 2**62]}, "is too large for any tensor"),
        ({"shape": [1] * 100_000}, "a shape of 100000 axes"),
        ({"shape": [0, 2**62, 2**62]}, "is too large for any tensor"),
        ({"shape": [6]}, "takes 24 bytes, data_offsets give 20"),
        ({"data_offsets": [20, 0]}, "do not ascend"),
        ({"data_offsets": [0]}, "must be two whole numbers"),
        ({"data_offsets": [0, True]}, "must be two whole numbers"),
    ],
)
def test_m03_sizes(file: Path, change: dict[str, Any], message: str) -> None:
    make.edit_header(file, lambda header: header["b"].update(change))
    refused(file, message)


def test_m04_tiling(file: Path) -> None:
    data = file.read_bytes()
    for edit, message in [
        (lambda h: h["a.codes"].update(data_offsets=[21, 33]), "leaves a hole"),
        (lambda h: h["a.codes"].update(data_offsets=[19, 31]), "overlaps"),
    ]:
        file.write_bytes(data)
        make.edit_header(file, edit)
        refused(file, message)
    for broken, message in [(data[:-1], "truncated"), (data + b"x", "bytes follow that belong to no tensor")]:
        file.write_bytes(broken)
        refused(file, message)


def test_m05_canonical_header(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    again = make.write(tmp_path / "again.safetensors").read_bytes()
    assert again == data
    header, body = make.split(data)
    names = [name for name in header if name != "__metadata__"]
    assert next(iter(header)) == "__metadata__"
    assert names == sorted(names, key=lambda n: (-DTYPE_BYTES[header[n]["dtype"]], n))
    assert (len(data) - len(body)) % 8 == 0
    file.write_bytes(make.join(json.dumps(header), body))  # the same, with spaces
    with Checkpoint(file) as checkpoint, pytest.raises(DigestError, match="header's bytes changed"):
        list(checkpoint.verify())


def test_m06_metadata(file: Path) -> None:
    data = file.read_bytes()
    make.edit_header(file, lambda h: h["__metadata__"].update(extra="1"))
    refused(file, "and nothing else")
    file.write_bytes(data)
    make.edit_header(file, lambda h: h["__metadata__"].pop("seedpack"))
    refused(file, "is not packed: .* has no manifest", NotPackedError)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(more=1),
        lambda m: m.pop("shared"),
        lambda m: m["codecs"][0].update(more=1),
        lambda m: m["tensors"]["b"].update(more=1),
        lambda m: m["tensors"]["b"].pop("dtype"),
    ],
)
def test_m07_exact_keys(file: Path, change: Any) -> None:
    make.edit_manifest(file, change)
    refused(file, "unknown keys|missing keys")


def test_m08_newer_version(file: Path) -> None:
    make.edit_manifest(file, lambda m: m.update(seedpack=2, something="new"))
    refused(file, "format version 2, this seedpack reads up to 1; install a newer seedpack-torch", VersionError)


def test_m09_manifest_digest(file: Path) -> None:
    make.edit_manifest(file, lambda m: m["tensors"]["a.weight"].update(shape=[3, 15]), seal=False)
    refused(file, "its bytes changed since it was written", DigestError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": 2}, "codec must be a number below 2"),
        ({"codec": True}, "codec must be a number"),
        ({"dtype": "float"}, "unknown dtype"),
        ({"shape": "3"}, "shape must be a list of whole numbers"),
        ({"shape": [-1]}, "shape must be a list of whole numbers"),
        ({"transposed": True, "shape": [16]}, "for matrices only"),
        ({"transposed": True, "shape": [3, 4, 4]}, "for matrices only"),
        ({"parts": {"codes": "0" * 64}}, "no principal part"),
        ({"parts": {"weight": "0" * 63}}, "needs a name"),
        ({"parts": {"weight": "0" * 64, "A": "0" * 64}}, "needs a name"),
        ({"transposed": False}, "'transposed' is true or left out"),
    ],
)
def test_m10_tensor_entries(file: Path, change: dict[str, Any], message: str) -> None:
    make.edit_manifest(file, lambda m: m["tensors"]["a.weight"].update(change))
    refused(file, message)


def test_m11_keys_and_parts(file: Path) -> None:
    data = file.read_bytes()
    header, _ = make.split(data)
    assert {"a.weight", "a.codes", "a.exponent_bias", "b"} == header.keys() - {"__metadata__"}
    make.edit_header(file, lambda h: h.update({"a.code5": h.pop("a.codes")}))
    refused(file, "its part 'codes' .* is not in the files")
    file.write_bytes(data)
    make.edit_manifest(file, lambda m: m["tensors"].pop("b"))
    refused(file, "1 stored tensors are not in the manifest, such as 'b'")
    file.write_bytes(data)
    make.edit_manifest(file, lambda m: m["tensors"].update({"a.codes": m["tensors"]["b"]}))
    refused(file, "both claim the key 'a.codes'")


def test_m12_part_digests(file: Path) -> None:
    import hashlib

    header, body = make.split(file.read_bytes())
    start, end = header["b"]["data_offsets"]
    manifest = json.loads(header["__metadata__"]["seedpack"])
    assert manifest["tensors"]["b"]["parts"]["weight"] == hashlib.sha256(b"F32[5]\n" + body[start:end]).hexdigest()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(file, "tensor 'a.weight', part 'weight': its bytes changed", DigestError)


def test_m13_raw_form(file: Path) -> None:
    make.edit_manifest(file, lambda m: m["tensors"]["b"].update(shape=[1, 5]))
    refused(file, r"stored as F32 \[5\], manifest says F32 \[1, 5\]")


def test_m14_codec_id_and_version(file: Path) -> None:
    data = file.read_bytes()

    def seedlm(manifest: dict[str, Any]) -> dict[str, Any]:
        return next(c for c in manifest["codecs"] if c["id"] == "seedlm")

    make.edit_manifest(file, lambda m: seedlm(m).update(id="wavelet"))
    refused(file, "unknown codec 'wavelet'; known: basis, field, mask, raw, seedlm, stack, svd", UnknownCodecError)
    file.write_bytes(data)
    make.edit_manifest(file, lambda m: seedlm(m).update(version=7))
    refused(file, "the file has version 7, here is 0; upgrade", VersionError)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"seed_bits": 16, "block": 8, "rank": 3, "exponents": 3, "more": 1},
        {"seed_bits": 40, "block": 8, "rank": 3, "exponents": 3},
        {"seed_bits": 16, "block": 8, "rank": 9, "exponents": 3},
        {"seed_bits": 16.0, "block": 8, "rank": 3, "exponents": 3},
        {"seed_bits": 16, "block": 8, "rank": 3, "exponents": [3]},
    ],
)
def test_m15_hyperparameters(file: Path, config: dict[str, Any]) -> None:
    make.edit_manifest(file, lambda m: next(c for c in m["codecs"] if c["id"] == "seedlm").update(config=config))
    refused(file, "'a.weight'.*seedlm", CodecError)


def test_m16_part_forms(file: Path, tmp_path: Path) -> None:
    make.edit_manifest(file, lambda m: m["tensors"]["a.weight"].update(shape=[3, 24]))
    refused(
        file,
        r"part 'weight' of a weight \[3, 24\]: expected U8 \[3, 3, 2\], found U8 \[3, 2, 2\]",
        CodecError,
    )
    make.edit_manifest(file, lambda m: m["tensors"]["a.weight"].update(shape=[3, 2, 2]))
    refused(file, "principal part has the shape of the dense weight")
    make.write(file.with_name("other.safetensors"))
    make.edit_header(file.with_name("other.safetensors"), lambda h: h["a.exponent_bias"].update(dtype="F8_E4M3"))
    refused(file.with_name("other.safetensors"), "must be of integers, not F8_E4M3")


def test_m17_shared_names(file: Path) -> None:
    assert load(file, dense=True).keys() == {"a.weight", "b", "tied.weight"}
    for shared in ({"x": "nowhere"}, {"b": "a.weight"}, {"x": 3}):
        make.edit_manifest(file, partial(update, shared=shared))
        refused(file, "must be new and point to a stored tensor")


def test_m18_shards(tmp_path: Path) -> None:
    make.write(tmp_path, shard_bytes=30)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.manifest.tensors.keys() == {"a.weight", "b"} and checkpoint.manifest.shared == make.SHARED
        assert [error for _, error in checkpoint.verify()] == [None, None]
    with Checkpoint(tmp_path / names[0]) as alone:  # each shard is a checkpoint of its own
        assert list(alone.manifest.tensors) == ["a.weight"]
    index = tmp_path / names[2]
    text = index.read_text()
    for broken, message in [
        (text.replace("model-00001", "../model-00001"), "names the shard"),
        (text.replace("model-00001", "model-00009"), "names the shard"),
        ('{"weight_map": 3}', "'weight_map' must map"),
        ("[", "not valid JSON"),
    ]:
        index.write_text(broken)
        with pytest.raises(FormatError, match=message):
            Checkpoint(tmp_path)
    index.write_text(text)
    shutil.copy(tmp_path / names[0], tmp_path / names[1])
    with pytest.raises(FormatError, match="is in model-00001-of-00002.safetensors and"):
        Checkpoint(tmp_path)


def test_m19_config_json(file: Path, tmp_path: Path) -> None:
    with Checkpoint(file) as checkpoint:
        packed = checkpoint.manifest.packed_only().to_json()
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(file, folder / "model.safetensors")
    make.edit_header(folder / "model.safetensors", lambda h: h["__metadata__"].pop("seedpack"))
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "seedpack", **packed}}))
    with Checkpoint(folder) as checkpoint:
        assert list(checkpoint.manifest.tensors) == ["a.weight"] and checkpoint.raw_keys() == ["b"]
        assert [error for _, error in checkpoint.verify()] == [None]
    packed["tensors"]["a.weight"]["shape"] = [3, 15]
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "seedpack", **packed}}))
    with pytest.raises(DigestError):
        Checkpoint(folder)


def test_m20_bit_fields() -> None:
    values = torch.tensor([[1, 2, 3], [-1, 0, 5]])
    packed = pack(values, 12)
    assert packed.shape == (2, 2, 3)
    stream = int.from_bytes(bytes(packed[0].flatten().tolist()), "little")
    assert [stream >> 12 * i & 0xFFF for i in range(4)] == [1, 2, 3, 0]
    assert unpack(packed, 3, 12)[1].tolist() == [0xFFF, 0, 5]


def test_m21_lfsr() -> None:
    listed = {int(k): tuple(map(int, taps.split())) for k, taps in re.findall(r"\| (\d+) \| ((?:\d+ ?)+)(?= \|)", SPEC)}
    assert listed == LFSR_TAPS
    assert f"{lfsr_matrix(4, 3, 4, 2).tolist()}" in SPEC
    codec = SeedLMCodec()
    parts = codec.encode(torch.randn(2, 16))
    parts["weight"][1, 1] = 0
    with pytest.raises(CodecError, match="a seed is 0"):
        codec.check(parts, (2, 16))


def test_m22_philox() -> None:
    for constant in ("D2511F53", "CD9E8D57", "9E3779B9", "BB67AE85"):
        assert constant in SPEC
    assert philox_words(0, 4).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert rademacher(0, 1, 4).tolist() == [[-1.0 if 0x6627E8D5 >> k & 1 else 1.0 for k in range(4)]]


def test_m23_squirrel5() -> None:
    for constant in ("D2A80A3F", "A884F197", "6C736F4B", "B79F3ABB", "1B56C4F5"):
        assert constant in SPEC
    inverse = pow(0xD2A80A3F, -1, 2**32)
    assert squirrel5(torch.tensor([5]), 3) == squirrel5(torch.tensor([(5 + 3 * inverse) % 2**32]), 0)


def test_m24_trellis() -> None:
    found = re.findall(r"\| (\d), (\d(?:\.5)?) \| ([0-9A-F]{8}) \| ([0-9A-F]{8}) (?=\|)", SPEC)
    assert {(int(v), float(k)): (int(a, 16), int(b, 16)) for v, k, a, b in found} == TRELLIS_MULTIPLIERS
    assert trellis_key(0) == 0x6627E8D5 == philox_words(0, 1)[0]
    h = (0xBEEF * trellis_multiplier(4, 16) + 0x6627E8D5) % 2**32
    expected = sum(h.to_bytes(4, "little")) - 510
    assert trellis_values(torch.tensor([0xBEEF]), trellis_multiplier(4, 16), trellis_key(0)).tolist() == [[expected]]
    b = ((0xBEEF * trellis_multiplier(2, 16, 2) + 0x6627E8D5) % 2**32).to_bytes(4, "little")
    pair = [b[0] + b[1] + b[2] - 382, b[1] - b[2] + b[3] - 127]
    assert trellis_values(torch.tensor([0xBEEF]), trellis_multiplier(2, 16, 2), trellis_key(0), 2).tolist() == [pair]


def test_schema_describes_real_manifests(file: Path) -> None:

    schema = json.loads(files("seedpack.formats").joinpath("manifest.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    header, _ = make.split(file.read_bytes())
    document = json.loads(header["__metadata__"]["seedpack"])
    jsonschema.validate(document, schema)
    assert schema["properties"]["tensors"]["additionalProperties"]["properties"]["dtype"]["enum"] == list(DTYPE_BYTES)
    changes: list[dict[str, Any]] = [{"more": 1}, {"seedpack": 2}, {"codecs": [{}]}, {"digest": "x"}]
    for change in changes:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**document, **change}, schema)
        with pytest.raises(FormatError):
            loads_manifest(json.dumps({**document, **change}), "x")


def test_m25_views(tmp_path: Path) -> None:
    weight = torch.randn(12, 5)
    codec = BasisCodec(count=20)
    parts = codec.encode(weight)
    weight = codec.decode(parts, (12, 5), torch.float32)
    planned = [PlannedTensor("basis", codec.spec(), "F32", (12, 5), codec.parts((12, 5)))]
    views = {"a": View("basis", 3, (2, 4), 0.5), "b": View("basis", 11, (49,), 1.0)}
    path = tmp_path / "a.safetensors"
    with CheckpointWriter(path, planned, {}, "test", views=views) as writer:
        writer.write("basis", {name: to_bytes(part) for name, part in parts.items()})
    found = load(path, dense=True)
    assert found.keys() == {"a", "b"}
    assert torch.equal(found["a"], weight.flatten()[3:11].view(2, 4) / 2)
    assert torch.equal(found["b"], weight.flatten()[11:])
    with Checkpoint(path) as checkpoint:
        document = checkpoint.manifest.to_json()
        assert all(error is None for _, error in checkpoint.verify())
    jsonschema.validate(document, json.loads(files("seedpack.formats").joinpath("manifest.schema.json").read_text()))
    good, data = document["views"]["a"], path.read_bytes()
    changed: tuple[tuple[Any, str], ...] = (
        ({"a": {**good, "tensor": "none"}}, "must be a new name for a piece of a stored tensor"),
        ({"basis": good}, "must be a new name for a piece of a stored tensor"),
        ({"a": {**good, "offset": -1}}, "offset must be a whole number"),
        ({"a": {**good, "offset": 53}}, "ends at element 61 of 60"),
        ({"a": {**good, "scale": 1}}, "scale a number"),
        ({"a": {**good, "scale": None}}, "scale a number"),
        ({"a": {**good, "more": 1}}, "unknown keys"),
        ({"a": {**good, "shape": [2.0]}}, "shape must be a list"),
        ({"a": 3}, "expected a JSON object"),
        ({}, "must be left out where there are none"),
    )
    for given, message in changed:
        path.write_bytes(data)
        make.edit_manifest(path, partial(update, views=given))
        refused(path, message)


def test_m26_levels(tmp_path: Path) -> None:
    assert [level_of(name) for name in ("a.more_1", "more_12", "a.right_more_3", "a.more_0", "a.more_01", "amore_2")] == [
        1, 12, 3, 0, 0, 0,
    ]  # fmt: skip
    tensors = {"a.weight": torch.randn(20, 30), "z": torch.ones(5, dtype=torch.int16)}
    path = tmp_path / "a.safetensors"
    compress(tensors, path, codec=SVDCodec(rank=6, levels=3, oversampling=20))
    data = path.read_bytes()
    with Checkpoint(path) as checkpoint:
        order = list(checkpoint.files[0].header.tensors)
        ends = [
            checkpoint.files[0].header.data_start + info.end for info in checkpoint.files[0].header.tensors.values()
        ]
    assert order == ["a.right", "a.weight", "z", "a.more_1", "a.right_more_1", "a.more_2", "a.right_more_2"]
    dense = [load(path, dense=True, fraction=share)["a.weight"] for share in (0.4, 0.7, 1.0)]
    errors = [float((value - tensors["a.weight"]).square().sum()) for value in dense]
    assert errors[0] > errors[1] > errors[2] and torch.equal(dense[2], load(path, dense=True)["a.weight"])
    for end, level in ((ends[2], 0), (ends[3], 0), (ends[4] - 1, 0), (ends[4], 1), (ends[6] - 1, 1), (ends[6], 2)):
        path.write_bytes(data[:end])
        found = load(path, dense=True, fraction=1.0)["a.weight"]
        assert torch.equal(found, dense[level])
    path.write_bytes(data[: ends[2] - 1])
    with pytest.raises(FormatError, match="cut off before the first level of tensor 'z' ends"):
        load(path, dense=True, fraction=1.0)
    path.write_bytes(data + b"x")
    with pytest.raises(FormatError, match="bytes follow that belong to no tensor"):
        load(path, dense=True, fraction=1.0)


def test_m27_the_record_of_a_folder(tmp_path: Path) -> None:
    with staged(tmp_path / "out", directory=True) as partial:
        (partial / "config.json").write_text("{}")
    text = (tmp_path / "out" / "seedpack.json").read_text()
    record = json.loads(text)
    assert record.keys() == {"seedpack", "writer", "files", "digest"} and text == dumps_canonical(record)
    assert record["files"] == {"config.json": hashlib.sha256(b"{}").hexdigest()}
    body = dumps_canonical({key: value for key, value in record.items() if key != "digest"})
    assert record["digest"] == hashlib.sha256(body.encode()).hexdigest()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="did not write"), staged(tmp_path / "out", directory=True, force=True):
        raise AssertionError("not reached")
