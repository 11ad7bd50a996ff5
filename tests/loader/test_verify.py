"""Verifying costs no more than the file is large, and says what it has not done."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

import seedpack
from seedpack import keys
from seedpack.cli.main import cli
from seedpack.codecs import names, registry
from seedpack.codecs.base import Codec, Shape
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.mask import WEIGHTS_AT_ONCE, MaskCodec
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.stack import StackCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.dtypes import TORCH_DTYPES
from seedpack.errors import DigestError, KeyNeededError
from seedpack.formats import Checkpoint, PartSpec
from seedpack.image.codec import FieldCodec
from seedpack.loader.verify import Verified, verify
from tests.codecs.test_decoding_cost import linux, measured
from tests.helpers.bombs import blank_image, parts_of, write_blank_image, write_tensors
from tests.helpers.models import llama


def results(path: Path, max_bytes: int | None = None) -> list[Verified]:
    with Checkpoint(path, max_bytes=max_bytes) as checkpoint:
        return list(verify(checkpoint))


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["verify", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def images(path: Path, count: int, height: int, width: int) -> Path:
    """Write images whose streams are zeros, as few as there can be."""
    codec = FieldCodec(sizes=(299, 100, 152, 200))
    parts = {name: torch.zeros_like(part) for name, part in parts_of(codec, (height, width * 3)).items()}
    parts["weight"][86:94] = torch.tensor([0, 0, 128, 63] * 2, dtype=torch.uint8)[:, None, None]  # steps of 1
    return write_tensors(path, {f"i{i}": (codec, (height, width, 3), parts) for i in range(count)}, dtype="U8")


def bombs(folder: Path) -> Iterator[Path]:
    """Yield files of at most ten kilobytes that ask for much."""
    square = 1 << 15, 1 << 15
    yield write_tensors(folder / "basis", {"w": (BasisCodec(count=1), square, parts_of(BasisCodec(count=1), square))})
    yield images(folder / "image", 1, 1000, 1000)
    yield images(folder / "thin", 1, 1 << 15, 1)
    yield images(folder / "images", 7, 480, 480)
    mask, shape = MaskCodec(2.0**-20), (2000, 2600)
    blank = {name: torch.zeros(part, dtype=TORCH_DTYPES[dtype]) for name, (dtype, part) in mask.parts(shape).items()}
    yield write_tensors(folder / "mask", {"w": (mask, shape, blank)})
    shared = {f"a{i}": "w" for i in range(300)}
    yield write_tensors(folder / "names", {"w": (BasisCodec(count=1), (1000, 1000), parts_of(BasisCodec(count=1), (1000, 1000)))}, shared=shared)  # fmt: skip


@linux
@pytest.mark.slow
def test_it_costs_no_more_than_the_file_is_large(tmp_path: Path) -> None:
    results(write_blank_image(tmp_path / "warm", 64, 64))
    for path in bombs(tmp_path):
        assert path.stat().st_size < 11_000, path.name
        memory, seconds = measured(lambda path=path: results(path))  # type: ignore[misc]
        assert memory < 100e6 and seconds < 2, (path.name, memory, seconds)


def test_what_was_not_decoded_is_said(tmp_path: Path) -> None:
    path = images(tmp_path / "a", 7, 480, 480)
    text = run(path).output
    assert "6 tensors checked by digest alone, such as 'i1': to decode them takes too long" in text
    assert "all 7 tensors match their digests" in text
    allowed = re.findall(r"--max-bytes (\d+MB) allows it", text)
    document = json.loads(run(path, "--json").stdout)
    (alone,) = document["digest_only"]
    assert alone["tensors"] == [f"i{i}" for i in range(1, 7)] and not document["bad"] and document["tensors"] == 7
    assert "--max-bytes" in alone["reason"]
    assert "alone" not in run(path, "--max-bytes", *allowed).output


def test_damage_is_found_in_what_is_not_decoded(tmp_path: Path) -> None:
    path = images(tmp_path / "a", 1, 2000, 2000)
    (intact,) = results(path)
    assert intact.digest_only and intact.error is None and intact.cost > 10**8
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    (damaged,) = results(path)
    assert isinstance(damaged.error, DigestError) and not damaged.digest_only


def test_masks_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, shape = MaskCodec(0.3), (3, WEIGHTS_AT_ONCE)
    parts = parts_of(codec, shape)
    monkeypatch.setattr(MaskCodec, "mask", lambda *_: pytest.fail("the whole mask was made"))
    codec.check(parts, shape)


@pytest.fixture
def no_key_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_in_use", ContextVar("in_use", default=frozenset()))


@pytest.mark.usefixtures("no_key_in_use")
def test_a_private_key_is_not_needed(tmp_path: Path) -> None:
    key, other = bytes(range(16)), bytes(16)
    check = keys.add_key(key)
    codecs: dict[str, Codec] = {"a": BasisCodec(count=9, key=check), "b": MaskCodec(0.5, key=check)}
    path = write_tensors(tmp_path / "w", {n: (codec, (8, 40), parts_of(codec, (8, 40))) for n, codec in codecs.items()})
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "other").write_bytes(other)
    assert "all 2 tensors match their digests" in run(path).output
    assert "all 2 tensors match their digests" in run(path, "--key-file", tmp_path / "key").output
    keys._in_use.set(frozenset())
    wrong = run(path, "--key-file", tmp_path / "other", code=1)
    assert wrong.stderr.count("the key given is another one") == 1 and not wrong.stdout


@pytest.mark.usefixtures("no_key_in_use")
def test_the_key_of_a_codec_in_another(tmp_path: Path) -> None:
    mask = MaskCodec(0.5, key=keys.add_key(bytes(16)))
    for codec in (
        SVDCodec.over(mask, rank=4),
        StackCodec.over(mask, 4, 10),
        StackCodec.over(SVDCodec.over(mask, rank=4), 4, 10),
    ):
        path = write_tensors(tmp_path / "a", {"w": (codec, (8, 40), codec.encode(torch.randn(8, 40)))})
        with pytest.raises(KeyNeededError, match="and none is given"):
            seedpack.load(path, dense=True)
        assert seedpack.load(path, dense=True, key=bytes(16))["w"].shape == (8, 40)
        with keys.use_key(bytes(range(16))), pytest.raises(KeyNeededError, match="the key given is another one"):
            results(path)
        path.unlink()


@dataclass(frozen=True)
class Absent(Codec):
    """A plug-in's codec that is not installed where the file is read."""

    id: ClassVar[str] = "absent"
    version: ClassVar[int] = 3

    def parts(self, shape: Shape) -> dict[str, PartSpec]:
        return {"weight": ("U8", (shape[0], 1, shape[1]))}


def test_a_codec_that_is_not_installed(tmp_path: Path) -> None:
    raw = RawCodec("F32"), (5,), {"weight": torch.ones(5)}
    weight = torch.zeros(4, 1, 6, dtype=torch.uint8)
    tensors: dict[str, tuple[Codec, Shape, dict[str, Tensor]]] = {
        f"t{i}": (Absent(), (4, 6), {"weight": weight}) for i in range(5)
    }
    path = write_tensors(tmp_path / "a", {"raw": raw, **tensors})
    text = run(path).output
    assert text.count("5 tensors checked by digest alone, such as 't0': unknown codec 'absent'; known") == 1
    assert "all 6 tensors match their digests" in text
    newer = replace(TrellisCodec())
    parts = parts_of(newer, (8, 64))
    object.__setattr__(newer, "spec", lambda: replace(TrellisCodec().spec(), version=9))
    text = run(write_tensors(tmp_path / "b", {"w": (newer, (8, 64), parts)})).output
    assert "codec 'trellis': the file has version 9, here is 3; upgrade seedpack" in text
    inside = SVDCodec.over(TrellisCodec(), rank=2)
    parts = parts_of(inside, (8, 64))
    inside.factors["id"] = "absent"  # type: ignore[index]
    assert "unknown codec 'absent'" in run(write_tensors(tmp_path / "c", {"w": (inside, (8, 64), parts)})).output
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "1 of 6 tensors are damaged" in run(path, code=1).output


def test_a_coder_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tensors(tmp_path / "a", {n: (MaskCodec(), (8, 8), parts_of(MaskCodec(), (8, 8))) for n in "ab"})
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    text = run(path).output
    assert "2 tensors checked by digest alone, such as 'a': mask: needs Constriction's range coder" in text


def test_packages_are_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = []

    def scan(**_: str) -> tuple[EntryPoint, ...]:
        scans.append(1)
        return (EntryPoint("raw-too", "seedpack.codecs.raw:RawCodec", "seedpack.codecs"),)

    monkeypatch.setattr(names, "entry_points", scan)
    names._scanned.cache_clear()
    tensors = {f"t{i}": (Absent(), (4, 6), {"weight": torch.zeros(4, 1, 6, dtype=torch.uint8)}) for i in range(300)}
    path = write_tensors(tmp_path / "a", tensors)
    started = time.process_time()
    assert all(result.digest_only for result in results(path))
    assert len(scans) == 1 and time.process_time() - started < 1
    assert "raw-too" in registry.codec_ids() and len(scans) == 1
    monkeypatch.syspath_prepend(str(tmp_path))  # as where a package is installed meanwhile
    assert "raw-too" in registry.codec_ids() and len(scans) == 2
    names._scanned.cache_clear()


def test_unknown_codecs_are_refused_when_loading(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "a", {"t": (Absent(), (4, 6), {"weight": torch.zeros(4, 1, 6, dtype=torch.uint8)})})
    with pytest.raises(seedpack.SeedpackError, match="tensor 't': unknown codec 'absent'"):
        seedpack.load(path, dense=True)


def test_blank_images_are_decoded(tmp_path: Path) -> None:
    codec, shape, _ = blank_image(200, 300)
    assert codec.checking_cost(shape) < 5e7
    (result,) = results(write_blank_image(tmp_path / "a", 200, 300))
    assert result == Verified("image", cost=codec.checking_cost(shape))


def test_the_files_of_a_folder(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    seedpack.compress(tmp_path / "dense", tmp_path / "packed", codec="svd", settings={"rank": 2})
    with Checkpoint(tmp_path / "packed") as checkpoint:
        found = {result.name for result in verify(checkpoint) if result.is_file}
    assert found == {"config.json", "generation_config.json", "tokenizer.json"}
    for name in found - {"config.json"}:
        (tmp_path / "packed" / name).write_text("[]")
    with Checkpoint(tmp_path / "packed") as checkpoint:
        damaged = [result.name for result in verify(checkpoint) if result.error is not None]
    assert damaged == ["generation_config.json", "tokenizer.json"]
