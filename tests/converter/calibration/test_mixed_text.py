"""Text of which a model writes half, and the other half is given."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

import seedpack
from seedpack import Calibration, CompressOptions
from seedpack.converter.calibration import calibrate
from seedpack.converter.calibration.calibrate import store_of, tokens_of
from seedpack.converter.run import Run
from seedpack.converter.sources.open import open_source
from seedpack.errors import ModelError, OptionError
from tests.helpers.models import llama
from tests.helpers.tokenizers import word_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "dense")
    word_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def text_of(length: int, path: Path) -> Path:
    path.write_text(" ".join(f"w{4 + i % 9}" for i in range(length)))
    return path


def tokens(folder: Path, output: Path, text: str, count: int) -> Tensor:
    options = CompressOptions(calibration=Calibration(text, tokens=count, context=32))
    source = open_source(folder)
    with Run(source, options, output) as run:
        return tokens_of(run, source.open_model(), store_of(run))


@pytest.mark.parametrize(("words", "given"), [(72, 2), (400, 8)])
def test_half_is_written_and_half_is_given(words: int, given: int, folder: Path, tmp_path: Path) -> None:
    file = text_of(words, tmp_path / "self.txt")
    mixed = tokens(folder, tmp_path / "out", f"self+{file}", 512)
    alone = tokens(folder, tmp_path / "out", str(file), 256)
    own = tokens(folder, tmp_path / "out", "self", 256)
    is_given = torch.tensor([any(torch.equal(ids, other) for other in alone) for ids in mixed])
    assert len(alone) == given == is_given.sum() and torch.equal(mixed[is_given], alone)
    assert torch.equal(mixed[~is_given], own)
    assert is_given[: len(mixed) // 2].sum() == given // 2  # in turns


def test_a_short_text_is_refused_before_the_model_writes(folder: Path, tmp_path: Path) -> None:
    with mock.patch.object(calibrate, "_written") as written, pytest.raises(ModelError, match="give a longer text"):
        tokens(folder, tmp_path / "out", f"self+{text_of(8, tmp_path / 'short.txt')}", 512)
    written.assert_not_called()


def test_packed_with_a_mixture(folder: Path, tmp_path: Path) -> None:
    files = [text_of(200 + 40 * i, tmp_path / f"{i}.txt") for i in range(2)]
    for name, text in (("one", files[0]), ("two", files[1]), ("again", files[0])):
        calibration = Calibration(f"self+{text}", tokens=256, context=32)
        seedpack.compress(folder, tmp_path / name, bits=3, settings={"effort": "fast"}, calibration=calibration)
    packed = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "again")]
    assert packed[0] == packed[2]
    with pytest.raises(ModelError, match=r"calibration 'nothing': no such file"):
        seedpack.compress(folder, tmp_path / "none", calibration="self+nothing")


def test_another_tokenizer_is_another_text(folder: Path, tmp_path: Path) -> None:
    text = str(text_of(400, tmp_path / "text.txt"))
    options = CompressOptions(calibration=Calibration(text, tokens=64, context=32))

    def key() -> str:
        with Run(open_source(folder), options, tmp_path / "out") as run:
            return store_of(run).folder.name

    before = key()
    assert key() == before
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"w4"', '"x4"'))
    assert key() != before


def test_a_mixture_names_a_text() -> None:
    for text in ("self+", "self+self", "self+auto"):
        with pytest.raises(OptionError, match=r"name a text behind the \+"):
            Calibration(text)
    with pytest.raises(OptionError, match="do not fill two sequences of 128; ask for at least 256"):
        Calibration("self+mine.txt", tokens=255)
