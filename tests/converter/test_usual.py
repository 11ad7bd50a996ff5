"""The command line calibrates language models unless it is told not to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import seedpack
from seedpack.cli.main import cli
from seedpack.converter import usual
from seedpack.converter.options import Calibration
from seedpack.converter.sources.open import open_source
from seedpack.errors import ModelError
from tests.helpers.models import ARCHITECTURES, llama
from tests.helpers.tokenizers import word_tokenizer

FEW: dict[str, Any] = {"tokens": 256, "context": 32}


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usual, "ENABLED", True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    llama(tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_auto_is_self_for_a_language_model(model: Path, tmp_path: Path) -> None:
    found = seedpack.compress(model, tmp_path / "auto", calibration=Calibration("auto", **FEW))
    assert found.calibration is None and not (tmp_path / "seedpack-calibration").exists()
    kept = seedpack.compress(model, tmp_path / "self", calibration=Calibration("self", **FEW))
    assert kept.calibration is not None and weights(tmp_path / "auto") == weights(tmp_path / "self")
    assert [file.name for file in kept.calibration.glob("*/*") if file.suffix] == ["tokens.safetensors"]
    kept = seedpack.compress(model, tmp_path / "plain", calibration=Calibration("self", sequential=False, **FEW))
    assert weights(tmp_path / "auto") != weights(tmp_path / "plain")
    seedpack.compress(model, tmp_path / "again", calibration=Calibration("auto", **FEW))
    assert kept.calibration is not None and list(kept.calibration.glob("*/index.json")), "what was asked for stays"
    seedpack.compress(model, tmp_path / "none", calibration="none")
    assert weights(tmp_path / "none") != weights(tmp_path / "self")


@pytest.mark.parametrize(
    ("asked", "options", "sequential"),
    [
        (None, {}, True),
        (False, {}, False),
        (None, {"jobs": 2}, False),
        (None, {"engine": "ray"}, False),
        (True, {"jobs": 2}, True),
    ],
)
@pytest.mark.parametrize("text", ["auto", "self"])
def test_layers_are_packed_in_sequence_where_one_process_fits(
    model: Path, text: str, asked: bool | None, options: dict[str, Any], sequential: bool
) -> None:
    chosen = seedpack.CompressOptions(calibration=Calibration(text, sequential=asked), **options)
    assert usual.with_usual_calibration(open_source(model), chosen).in_sequence is sequential


def test_a_longer_context_than_the_model_takes_is_cut(model: Path) -> None:
    options = seedpack.CompressOptions(calibration="auto")
    decided = usual.with_usual_calibration(open_source(model), options).calibrated
    assert decided is not None and (decided.text, decided.context, decided.is_usual) == ("self", 64, True)


@pytest.mark.parametrize("changes", [{"codec": "raw"}, {"codec": "basis"}, {"importance": {}}, {"calibration": "none"}])
def test_nothing_to_calibrate(model: Path, changes: dict[str, Any]) -> None:
    source = open_source(model)
    options = seedpack.CompressOptions(**{"calibration": "auto", **changes})
    decided = usual.with_usual_calibration(source, options)
    assert decided.calibrated is None


def test_other_models_are_packed_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    ARCHITECTURES["bert"]().save_pretrained(tmp_path / "bert")
    result = CliRunner().invoke(cli, ["compress", str(tmp_path / "bert"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0 and "calibration:" not in result.output, result.output
    monkeypatch.setattr(usual, "free_bytes", lambda: 1000)
    result = CliRunner().invoke(cli, ["compress", str(model), "-o", str(tmp_path / "small")])
    assert result.exit_code == 0 and "calibration:" not in result.output, result.output


def test_what_cannot_be_calibrated_is_packed_all_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("its layers are not known")

    monkeypatch.setattr("seedpack.converter.calibration.calibrate._require_readable", broken)
    said: list[str] = []
    report = seedpack.compress(
        model, tmp_path / "out", calibration=Calibration("auto", **FEW), progress=lambda *a: said.append(str(a))
    )
    assert report.error_db < -15 and any("not calibrated: its layers are not known" in text for text in said)
    assert not (tmp_path / "seedpack-calibration").exists()
    with pytest.raises(ValueError, match="its layers are not known"):
        seedpack.compress(model, tmp_path / "asked", calibration=Calibration("self", **FEW))


@pytest.mark.parametrize("text", ["auto", "self"])
def test_what_cannot_be_packed_in_sequence_is_calibrated_all_the_same(
    text: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a layer runs once alone")

    monkeypatch.setattr("seedpack.converter.calibration.sequence.DecoderLayer.packed", broken)
    said: list[str] = []
    calibration = Calibration(text, **FEW)
    report = seedpack.compress(
        model, tmp_path / "out", calibration=calibration, progress=lambda *a: said.append(str(a))
    )
    assert any("not in sequence: a layer runs once alone" in text for text in said)
    assert (report.calibration is None) == (text == "auto")
    stores = list((tmp_path / "seedpack-calibration").glob("*/index.json"))
    assert len(stores) == (text != "auto"), "what was begun in sequence is removed"
    seedpack.compress(model, tmp_path / "plain", calibration=Calibration("self", sequential=False, **FEW))
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")
    with pytest.raises(ModelError, match=r"cannot be packed in sequence \(a layer runs once alone\); leave that out"):
        seedpack.compress(model, tmp_path / "asked", calibration=Calibration("self", sequential=True, **FEW))
    assert not list((tmp_path / "seedpack-calibration").rglob("unclaimed"))


def test_the_command_says_so(model: Path, tmp_path: Path) -> None:
    command = ["compress", str(model), "--calibration-tokens", "256", "--calibration-context", "32", "-o"]
    result = CliRunner().invoke(cli, [*command, str(tmp_path / "a")])
    assert result.exit_code == 0 and "calibration: the model first writes 256 tokens" in result.output, result.output
    assert "--calibration none leaves it out" in result.output and not (tmp_path / "seedpack-calibration").exists()
    result = CliRunner().invoke(cli, [*command, str(tmp_path / "b"), "--shard", "1/1"])
    assert result.exit_code == 0 and "calibration:" not in result.output
    assert CliRunner().invoke(cli, ["merge", str(tmp_path / "b")]).exit_code == 0
    seedpack.compress(model, tmp_path / "c", calibration="none")
    assert weights(tmp_path / "b") == weights(tmp_path / "c")
