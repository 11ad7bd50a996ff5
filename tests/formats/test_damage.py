"""No damage goes unseen: every bit, and whatever hypothesis thinks of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seedpack.errors import FormatError, SeedpackError
from seedpack.formats import Checkpoint
from seedpack.formats.header import parse_header
from seedpack.formats.manifest import loads_manifest
from seedpack.loader.dense import stored_dense
from tests.helpers import checkpoints as make

QUICK = settings(max_examples=300, deadline=30_000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make.write(tmp_path_factory.mktemp("good") / "a.safetensors").read_bytes()


def damage(path: Path) -> list[str]:
    """Names of tensors that verify finds damaged, or ["header"]."""
    try:
        with Checkpoint(path) as checkpoint:
            return [name for name, error in checkpoint.verify() if error is not None]
    except FormatError:
        return ["header"]


def test_every_single_bit(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header, _ = make.split(good)
    start = len(good) - max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    owner = {"a.weight": "a.weight", "a.codes": "a.weight", "a.exponent_bias": "a.weight", "b": "b"}
    for byte in range(len(good)):
        for bit in range(8) if byte >= start else (byte % 8,):  # one bit of each byte of the header, all of the data
            broken = bytearray(good)
            broken[byte] ^= 1 << bit
            path.write_bytes(broken)
            found = damage(path)
            if byte < start:
                assert found, f"bit {bit} of header byte {byte} can flip unseen"
            else:
                key = next(
                    k
                    for k, v in header.items()
                    if k in owner and v["data_offsets"][0] <= byte - start < v["data_offsets"][1]
                )
                assert found == [owner[key]], f"bit {bit} of byte {byte}"


@pytest.mark.slow
def test_every_single_bit_of_the_header(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for bit in range(8 * (len(good) - 60)):
        broken = bytearray(good)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        assert damage(path), f"bit {bit} can flip unseen"


@QUICK
@given(data=st.data())
def test_mutations_are_refused_or_harmless(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Cuts, insertions, overwritten runs: an error of seedpack's, or the same tensors."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(good)
    with Checkpoint(path) as checkpoint:
        expected = {name: stored_dense(checkpoint, name) for name in checkpoint.manifest.tensors}
    at = data.draw(st.integers(0, len(good)))
    kind = data.draw(st.sampled_from(["cut", "insert", "overwrite", "repeat"]))
    junk = data.draw(st.binary(max_size=20))
    broken = {
        "cut": good[:at],
        "insert": good[:at] + junk + good[at:],
        "overwrite": good[:at] + junk + good[at + len(junk) :],
        "repeat": good[:at] + good,
    }[kind]
    path.write_bytes(broken)
    try:
        with Checkpoint(path) as checkpoint:
            found = {name: stored_dense(checkpoint, name) for name in checkpoint.manifest.tensors}
    except SeedpackError:
        return
    assert found.keys() == expected.keys() and all(found[n].equal(expected[n]) for n in found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "X"]) | JSON,
        "shape": st.lists(st.integers(-2, 2**70), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-5, 2**70), max_size=3) | JSON,
    }
)


@QUICK
@given(header=st.dictionaries(st.text(max_size=5), TENSOR | JSON, max_size=4), size=st.integers(0, 200))
def test_any_header(header: dict[str, object], size: int) -> None:
    import json

    text = json.dumps(header).encode()
    try:
        parsed = parse_header(text, 8 + len(text) + size, "x")
    except FormatError:
        return
    assert sum(info.nbytes for info in parsed.tensors.values()) == size


@QUICK
@given(raw=st.binary(max_size=300))
def test_any_bytes(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (raw, len(raw).to_bytes(8, "little") + raw):
        path.write_bytes(content)
        with pytest.raises(FormatError):
            Checkpoint(path)


@QUICK
@given(document=st.fixed_dictionaries(
    {"seedpack": st.just(1) | JSON, "writer": st.text(max_size=3) | JSON, "codecs": st.lists(JSON, max_size=2) | JSON,
     "tensors": st.dictionaries(st.text(max_size=3), JSON, max_size=2) | JSON, "shared": JSON, "digest": JSON}
))  # fmt: skip
def test_any_manifest(document: dict[str, object]) -> None:
    import json

    from seedpack.formats.manifest import _document_digest

    try:
        document["digest"] = _document_digest({k: v for k, v in document.items() if k != "digest"})
        loads_manifest(json.dumps(document), "x")
    except FormatError:
        return
    assert isinstance(document["codecs"], list)
