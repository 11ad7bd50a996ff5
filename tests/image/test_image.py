"""Images as coefficients, end to end."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

import seedpack
from seedpack import image
from seedpack.cli.main import cli
from seedpack.errors import CodecError, FormatError, ModelError, OutputError
from seedpack.image.codec import FieldCodec


def picture(height: int = 45, width: int = 70, channels: int = 3) -> Tensor:
    """Slopes, waves and an edge, uint8 [height, width, channels]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    planes = [0.3 + 0.4 * x + 0.2 * torch.sin(9 * y + k) + 0.2 * (x + y > 1 + 0.1 * k) for k in range(channels)]
    return (torch.stack(planes, -1).clamp(0, 1) * 255).round().to(torch.uint8)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10(((a.float() - b.float()) / 255).square().mean()))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("image") / "picture.spi"
    image.compress(picture(), file, size=2600, steps=60)
    return file


def test_what_is_promised_is_decoded(tmp_path: Path) -> None:
    steps: list[int] = []
    report = image.compress(picture(), tmp_path / "a.spi", size=2600, steps=60, watch=steps.append)
    found = image.decompress(tmp_path / "a.spi")
    assert found.dtype == torch.uint8 and found.shape == (45, 70, 3)
    assert psnr(found, picture()) == pytest.approx(report.psnr, abs=1e-3) and report.psnr > 25
    assert report.file_bytes == (tmp_path / "a.spi").stat().st_size <= 2600
    assert report.bits_per_pixel == pytest.approx(8 * report.file_bytes / (45 * 70)) and sum(steps) == 60
    image.compress(picture(), tmp_path / "b.spi", size=2600, steps=60)
    assert (tmp_path / "a.spi").read_bytes() == (tmp_path / "b.spi").read_bytes(), "it can be repeated"


def test_a_size_is_never_passed(tmp_path: Path) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    for size in (1700, 1820, 1903, 2220):
        report = image.compress(noise, tmp_path / "a.spi", size=size, steps=20, force=True)
        assert 0.9 * size < report.file_bytes <= size


def test_quality_is_met(tmp_path: Path) -> None:
    report = image.compress(picture(), tmp_path / "a.spi", psnr=24, steps=80)
    assert report.psnr >= 24 and psnr(image.decompress(tmp_path / "a.spi"), picture()) >= 24


@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 3), (1, 9, 1), (17, 2, 3), (33, 20, 1)])
def test_odd_sizes(tmp_path: Path, height: int, width: int, channels: int) -> None:
    given = picture(height, width, channels)
    report = image.compress(given, tmp_path / "a.spi", psnr=25, steps=10)
    found = image.decompress(tmp_path / "a.spi")
    assert found.shape == given.shape and report.psnr >= 25
    assert height * width == 1 or psnr(found, given) >= 25


def test_a_prefix_gives_a_blurred_image(packed: Path, tmp_path: Path) -> None:
    quality = [psnr(image.decompress(packed, fraction=f), picture()) for f in (0.25, 0.5, 0.75, 1.0)]
    assert quality == sorted(quality) and quality[-1] > quality[0] + 0.5
    data, cut = packed.read_bytes(), tmp_path / "cut.spi"
    cut.write_bytes(data[:-1])
    torch.testing.assert_close(image.decompress(cut, fraction=1.0), image.decompress(packed, fraction=0.75))
    with pytest.raises(FormatError):
        image.decompress(cut)


def test_it_is_a_checkpoint_like_any_other(packed: Path, tmp_path: Path) -> None:
    found = seedpack.load(packed, dense=True)
    assert found.keys() == {"image"}
    torch.testing.assert_close(found["image"], image.decompress(packed))
    for command in (
        ["verify", str(packed)],
        ["inspect", str(packed)],
        ["unpack", str(packed), "-o", str(tmp_path / "x")],
    ):
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.output


def test_what_is_set_around_changes_nothing(packed: Path, tmp_path: Path) -> None:
    expected = image.decompress(packed)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(image.decompress(packed), expected, rtol=0, atol=0)
    with torch.no_grad():
        image.compress(picture(), tmp_path / "a.spi", size=2600, steps=60)
    assert (tmp_path / "a.spi").read_bytes() == packed.read_bytes()
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(image.decompress(packed), expected, rtol=0, atol=0)
        assert image.compress(picture(), tmp_path / "b.spi", size=2600, steps=20).file_bytes <= 2600
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_damage_is_found(packed: Path, tmp_path: Path, place: float) -> None:
    data = bytearray(packed.read_bytes())
    data[int(place * len(data))] ^= 1
    (tmp_path / "bad.spi").write_bytes(data)
    with pytest.raises((FormatError, CodecError)):
        image.decompress(tmp_path / "bad.spi")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(4, 4, 3), "uint8"),
        (torch.zeros(4, 4, dtype=torch.uint8), "height, width"),
        (torch.zeros(0, 4, 3, dtype=torch.uint8), "height, width"),
        (torch.zeros(4, 4, 4, dtype=torch.uint8), "1 or 3"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, given: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        image.compress(given, tmp_path / "a.spi", size=3000)
    assert not list(tmp_path.iterdir())


def test_aims_out_of_reach_are_refused(tmp_path: Path) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    with pytest.raises(ModelError, match="too small: its header alone"):
        image.compress(noise, tmp_path / "a.spi", size=900)
    with pytest.raises(ModelError, match=r"cannot be brought to 50 dB; ask for less"):
        image.compress(noise, tmp_path / "a.spi", psnr=50, steps=5)
    with pytest.raises(ModelError, match="either a size or a psnr"):
        image.compress(noise, tmp_path / "a.spi")
    (tmp_path / "there.spi").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        image.compress(noise, tmp_path / "there.spi", size=5000)
    assert [f.name for f in tmp_path.iterdir()] == ["there.spi"] and (tmp_path / "there.spi").read_bytes() == b"mine"


def test_forged_streams_are_refused_or_decoded(packed: Path) -> None:
    draw = np.random.default_rng(0)
    codec = FieldCodec(sizes=(400, 40, 40, 40))
    for _ in range(20):
        parts = {
            name: torch.from_numpy(draw.integers(0, 256, shape, np.uint8))
            for name, (_, shape) in codec.parts((9, 30)).items()
        }
        with contextlib.suppress(CodecError):
            codec.check(parts, (9, 30))
            assert torch.isfinite(codec.decode(parts, (9, 30), torch.float32)).all()
    with pytest.raises(CodecError, match="up to 32,768 pixels a side"):
        codec.network((1 << 16, 3))
    with pytest.raises(CodecError, match="65,536 × 1"):
        image.compress(torch.zeros(1 << 16, 1, 3, dtype=torch.uint8), packed.with_name("b"), size=9000)


def test_files_of_images(tmp_path: Path) -> None:
    shown = picture(20, 30)
    image.write(shown, tmp_path / "a.png")
    torch.testing.assert_close(image.read(tmp_path / "a.png"), shown)
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright
    Image.fromarray(shown.numpy()).save(tmp_path / "turned.png", exif=turned)
    torch.testing.assert_close(image.read(tmp_path / "turned.png"), shown.rot90(-1))
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).save(tmp_path / "grey.png")
    assert image.read(tmp_path / "grey.png").shape == (10, 20, 1)
    Image.new("RGBA", (4, 4)).save(tmp_path / "clear.png")
    with pytest.raises(ModelError, match="transparency"):
        image.read(tmp_path / "clear.png")
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    with pytest.raises(ModelError, match="more than 8 bits"):
        image.read(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ModelError, match="is not an image"):
        image.read(tmp_path / "text.png")
    with pytest.raises(ModelError, match=r"as in photo\.png"):
        image.write(shown, tmp_path / "a.spi")


def test_the_program(tmp_path: Path) -> None:
    image.write(picture(), tmp_path / "a.png")
    source, out, back = (str(tmp_path / name) for name in ("a.png", "a.spi", "back.png"))
    run = CliRunner()
    result = run.invoke(cli, ["image", "compress", source, "-o", out, "--bytes", "2600", "--steps", "30", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["file_bytes"] <= 2600
    result = run.invoke(cli, ["image", "decompress", out, "-o", back])
    assert result.exit_code == 0 and "70 × 45, RGB" in result.output
    torch.testing.assert_close(image.read(back), image.decompress(out))
    assert run.invoke(cli, ["image", "compress", source, "-o", out]).exit_code == 2
    result = run.invoke(cli, ["image", "decompress", source, "-o", back, "--force"])
    assert result.exit_code == 1
