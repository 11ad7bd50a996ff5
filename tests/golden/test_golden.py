"""Golden files: decoding is pinned for ever, encoding where it is deterministic. A missing file is a failure."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import seedpack
from seedpack.codecs.base import Codec
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.formats import Checkpoint
from seedpack.kernels.dispatch import Backend
from seedpack.loader.dense import stored_parts
from tests.golden import make


@pytest.mark.parametrize("name", make.CASES)
def test_files_are_what_was_committed(name: str) -> None:
    folder = make.folder(name)
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["decoded.safetensors", "packed.safetensors"]
    for line in lines:
        digest, file = line.split()
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest


def test_no_case_is_forgotten() -> None:
    on_disk = {path.parent for path in make.HERE.rglob("SHA256SUMS")}
    assert {make.folder(name) for name in make.CASES} <= on_disk


def same(found: torch.Tensor, expected: torch.Tensor, codec: Codec) -> None:
    assert found.dtype == expected.dtype
    if (
        isinstance(codec, (BasisCodec, SVDCodec, TrellisCodec)) and found.is_floating_point()
    ):  # products are summed in any order
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", make.CASES)
def test_decoding(name: str) -> None:
    path = make.folder(name) / "packed.safetensors"
    with Checkpoint(path) as checkpoint:
        assert not [error for _, error in checkpoint.verify() if error]
    found, expected = seedpack.load(path, dense=True), load_file(make.folder(name) / "decoded.safetensors")
    assert found.keys() == expected.keys() == {"layer.weight", "layer.bias", "steps", "tied.weight"}
    for key, tensor in expected.items():
        same(found[key], tensor, make.CASES[name])


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("name", [name for name, codec in make.CASES.items() if codec.id in ("seedlm", "trellis")])
def test_every_backend_decodes_the_same(name: str, backend: Backend) -> None:
    with Checkpoint(make.folder(name) / "packed.safetensors") as checkpoint:
        codec, parts = stored_parts(checkpoint, "layer.weight")
    found = codec.decode(parts, (20, 37), torch.float32, backend)
    same(found, load_file(make.folder(name) / "decoded.safetensors")["layer.weight"], codec)


ENCODED = [n for n, codec in make.CASES.items() if codec.id not in ("basis", "svd") and n not in make.ENCODED_OTHERWISE]


@pytest.mark.parametrize("name", ENCODED)
def test_encoding(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes again, but for the name of the program that wrote them."""
    with Checkpoint(make.folder(name) / "packed.safetensors") as checkpoint:
        monkeypatch.setattr("seedpack.converter.pipeline.WRITER", checkpoint.manifest.writer)
    make.write(tmp_path / "again", make.CASES[name])
    again, golden = (p / "packed.safetensors" for p in (tmp_path / "again", make.folder(name)))
    assert again.read_bytes() == golden.read_bytes()
