"""Files that ask for more than the limit are refused before anything is decoded, and those that anyone makes are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import seedpack
from seedpack import image
from seedpack.cli.main import cli
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.mask import MaskCodec
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.registry import codec_ids
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.stack import StackCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.errors import CodecError, FormatError, LimitError, ModelError
from seedpack.eval.tensors import compare_tensors
from seedpack.formats import Checkpoint, View
from seedpack.image.codec import FieldCodec
from seedpack.loader import limits
from seedpack.loader.dense import require_decodable, stored_codec
from seedpack.loader.verify import verify
from tests.helpers.bombs import blank_image, parts_of, write_blank_image, write_tensors

BASIS = BasisCodec(count=1)


def basis_file(path: Path, *shape: int, **options: Any) -> Path:
    return write_tensors(path, {"w.weight": (BASIS, shape, parts_of(BASIS, shape))}, **options)


@pytest.fixture
def bomb(tmp_path: Path) -> Path:
    """Make 604 bytes that stand for four gigabytes."""
    path = basis_file(tmp_path / "bomb", 1 << 15, 1 << 15)
    assert path.stat().st_size < 1000
    return path


@pytest.fixture(autouse=True)
def nothing_is_decoded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "bomb" in request.fixturenames:
        monkeypatch.setattr(BasisCodec, "decode", lambda *_: pytest.fail("decoded"))


REFUSED = r"tensor 'w\.weight' would take 8\.8 GB decoded, more than the limit of 1\.0 GB .* pass --max-bytes 9GB"


@pytest.mark.parametrize(
    "use",
    [
        lambda bomb: seedpack.load(bomb, dense=True),
        lambda bomb: seedpack.unpack(bomb, bomb.with_name("out")),
        lambda bomb: list(compare_tensors(bomb, bomb)[2]),
    ],
    ids=["load", "unpack", "compare"],
)
def test_a_bomb_is_refused(bomb: Path, use: Callable[[Path], object]) -> None:
    with pytest.raises(LimitError, match=REFUSED):
        use(bomb)
    assert [file.name for file in bomb.parent.iterdir()] == ["bomb"]


@pytest.mark.parametrize("arguments", [["load"], ["unpack", "-o", "out"], ["compare", "bomb"]], ids=str)
def test_a_bomb_gets_one_line(bomb: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bomb.parent)
    result = CliRunner().invoke(cli, [*arguments, "bomb"])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert "would take 8.8 GB decoded" in result.stderr
    assert CliRunner().invoke(cli, ["verify", "bomb"]).exit_code == 0


def test_the_caller_s_limit_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = basis_file(tmp_path / "a", 512, 512)
    with pytest.raises(LimitError, match=r"more than max_bytes, 1\.0 MB"):
        seedpack.load(path, dense=True, max_bytes=10**6)
    monkeypatch.setattr(limits, "LEAST", 10**6)
    with pytest.raises(LimitError, match=r"more than the limit of 1\.0 MB for a file of"):
        seedpack.load(path, dense=True)
    assert seedpack.load(path, dense=True, max_bytes=10**9)["w.weight"].shape == (512, 512)
    options = ["--max-bytes", "1GB"]
    assert CliRunner().invoke(cli, ["load", str(path), *options]).exit_code == 0
    assert CliRunner().invoke(cli, ["unpack", str(path), "-o", str(tmp_path / "b"), *options]).exit_code == 0
    assert CliRunner().invoke(cli, ["compare", str(path), str(path), *options]).exit_code == 0
    for wrong in (0, 1.5, "5GB"):
        with pytest.raises(FormatError, match="max_bytes must be a whole number from 1"):
            seedpack.load(path, dense=True, max_bytes=wrong)  # type: ignore[arg-type]


def test_it_is_not_for_folders(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="max_bytes is for a module that is filled"):
        seedpack.load(tmp_path, max_bytes=10**9)


def test_memory_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = basis_file(tmp_path / "a", 2048, 2048)
    monkeypatch.setattr(limits, "free_bytes", lambda: 10**8)
    with pytest.raises(LimitError, match=r"more than the 100\.0 MB of memory that are free"):
        seedpack.load(path, dense=True)
    assert seedpack.load(path, dense=True, max_bytes=10**9)


def test_what_stays_packed_is_not_decoded(bomb: Path) -> None:
    with torch.device("meta"):
        net = nn.ModuleDict({"w": nn.Linear(1 << 15, 1 << 15, bias=False)})
    seedpack.load(bomb, model=net)
    holder = nn.Module()
    holder.w = nn.Embedding(1 << 15, 1 << 15, max_norm=1.0, device="meta")  # which writes to its weight
    with pytest.raises(LimitError, match=REFUSED):
        seedpack.load(bomb, model=holder)


def test_the_file_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = basis_file(tmp_path / "a", 256, 256, shared={f"a{i}": "w.weight" for i in range(300)})
    monkeypatch.setattr(limits, "LEAST", 40_000_000)
    with pytest.raises(LimitError, match=r"the dense file would take 78\.9 MB"):
        seedpack.unpack(path, tmp_path / "out")
    seedpack.unpack(path, tmp_path / "out", max_bytes=10**8)
    assert len(seedpack.load(path, dense=True)) == 301, "names of one tensor take no more than it"


def test_names_of_one_tensor_share_it(tmp_path: Path) -> None:
    raw = RawCodec("F32")
    tensors = {
        "raw": (raw, (40, 50), {"weight": torch.randn(40, 50)}),
        "packed": (BASIS, (40, 50), parts_of(BASIS, (40, 50))),
        "whole": (BASIS, (40, 50), parts_of(BASIS, (40, 50))),
    }
    shared = {f"{name} {i}": name for i in range(3) for name in ("raw", "packed")}
    views = {"piece 1": View("whole", 0, (20, 50)), "piece 2": View("whole", 1000, (20, 50), 2.0)}
    path = write_tensors(tmp_path / "a", tensors, shared=shared, views=views)
    state = seedpack.load(path, dense=True)
    for alias, name in shared.items():
        assert state[alias].data_ptr() == state[name].data_ptr()
    assert len({tensor.data_ptr() for tensor in state.values()}) == 4
    expected = {name: tensor.clone() for name, tensor in state.items()}
    path.write_bytes(bytes(path.stat().st_size))  # in place: a view of the mapping would change
    for name, tensor in state.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert torch.equal(tensor, expected[name])


def test_the_sum_of_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{i}": (BASIS, (256, 256), parts_of(BASIS, (256, 256))) for i in range(40)}
    path = write_tensors(tmp_path / "a", tensors)
    monkeypatch.setattr(limits, "LEAST", 9_000_000)
    with pytest.raises(LimitError, match=r"together with all others would take 1\d\.\d MB"):
        seedpack.load(path, dense=True)
    seedpack.unpack(path, tmp_path / "out", max_bytes=11_000_000)


def test_the_work_of_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is small, and so is what stays; but one after the other they would take long."""
    codec = BasisCodec(count=2000, generator="philox", coef_bits=2)
    path = write_tensors(tmp_path / "a", {f"t{i}": (codec, (32, 32), parts_of(codec, (32, 32))) for i in range(40)})
    with Checkpoint(path) as checkpoint:
        cost = stored_codec(checkpoint, "t0")[0].decoding_cost((32, 32))
    monkeypatch.setattr(limits, "LEAST", cost)
    monkeypatch.setattr(limits, "RATIO", 1)
    with pytest.raises(LimitError, match=r"40 tensors, one after the other, would take"):
        seedpack.load(path, dense=True)
    with pytest.raises(LimitError, match=r"40 tensors, one after the other, would take"):
        seedpack.unpack(path, tmp_path / "out")
    assert len(seedpack.load(path, dense=True, max_bytes=2 * cost)) == 40


@pytest.mark.parametrize(
    ("codec", "shape"),
    [
        (TrellisCodec(1), (256, 1024)),
        (BasisCodec(count=64), (2048, 2048)),
        (BasisCodec(count=64, generator="philox"), (2048, 2048)),
        (MaskCodec(0.01), (512, 512)),
        (SVDCodec(rank=1), (2048, 2048)),
    ],
    ids=str,
)
def test_legitimate_ratios_need_no_switch(tmp_path: Path, codec: Any, shape: tuple[int, int]) -> None:
    path = write_tensors(tmp_path / "a", {"w.weight": (codec, shape, parts_of(codec, shape))})
    state = seedpack.load(path, dense=True)
    assert state["w.weight"].nbytes > 20 * path.stat().st_size
    seedpack.unpack(path, tmp_path / "b")
    with Checkpoint(path) as checkpoint:
        assert not any(result.error or result.digest_only for result in verify(checkpoint))


def test_blank_images_of_some_megapixels(tmp_path: Path) -> None:
    small = write_blank_image(tmp_path / "a", 300, 400)
    assert small.stat().st_size < 2000 and image.decompress(small).shape == (300, 400, 3)
    with pytest.raises(LimitError, match="tensor 'image' would take"):
        image.decompress(small, max_bytes=10**6)
    codec = FieldCodec(sizes=(1000, 1000, 2000, 4000))

    def written(height: int, width: int) -> Path:
        tensors = {"image": (codec, (height, width, 3), parts_of(codec, (height, 3 * width)))}
        return write_tensors(tmp_path / str(height), tensors, dtype="U8")

    with Checkpoint(written(2000, 4000)) as checkpoint:
        require_decodable(checkpoint, ["image"])
    with pytest.raises(LimitError, match="tensor 'image' would take"):
        image.decompress(written(4096, 8192))


def test_streams_that_no_image_has(tmp_path: Path) -> None:
    """The decoder reads zeros behind a stream's end, without end."""
    for height, width, channels in ((1, 1, 1), (64, 64, 3), (1, 5000, 1), (700, 500, 3)):
        codec, shape, parts = blank_image(height, width, channels)
        codec.check(parts, shape)
    bare = FieldCodec(sizes=(103, 0, 0, 0))
    tensors = {"image": (bare, (8192, 8192, 3), parts_of(bare, (8192, 8192 * 3)))}
    path = write_tensors(tmp_path / "a", tensors, dtype="U8")
    with pytest.raises(CodecError, match="of a blank image of this size it would have at least"):
        image.decompress(path, max_bytes=10**11)
    assert "file is corrupt" in CliRunner().invoke(cli, ["verify", str(path)]).stderr


ANY: dict[str, Any] = {
    "basis": BasisCodec(count=4),
    "field": blank_image(4, 4)[0],
    "mask": MaskCodec(0.5),
    "seedlm": SeedLMCodec(),
    "stack": StackCodec.over(SeedLMCodec(), 4, 4),
    "svd": SVDCodec(rank=2),
    "trellis": TrellisCodec(),
}


@pytest.mark.parametrize("shape", [[0, 4], [4, 0], [0, 0]], ids=str)
@pytest.mark.parametrize("id", ANY)
def test_transposed_weights_without_elements(tmp_path: Path, id: str, shape: list[int]) -> None:
    assert {*ANY, "raw"} == set(codec_ids())
    codec = ANY[id]
    whole = (4, 12) if id == "field" else (4, 4)
    tensors = {"w": (codec, tuple(shape), parts_of(codec, whole))}
    path = write_tensors(tmp_path / "a", tensors, transposed=True)
    with pytest.raises(CodecError, match=r"tensor 'w': a weight of shape .* is not a matrix"):
        seedpack.load(path, dense=True)
    with Checkpoint(path) as checkpoint:
        (result,) = verify(checkpoint)
    assert "is not a matrix" in str(result.error)


def test_arithmetic_of_a_file_s_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = basis_file(tmp_path / "a", 8, 8)
    monkeypatch.setattr(BasisCodec, "parts", lambda *_: 1 // 0)
    with pytest.raises(CodecError, match="tensor 'w.weight': settings of codec 'basis' are not usable"):
        seedpack.load(path, dense=True)
