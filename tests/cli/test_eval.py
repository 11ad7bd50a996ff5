"""`seedpack eval` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from seedpack.cli.main import cli
from tests.helpers.task_folders import packed, pictures, task_folder
from tests.helpers.tokenizers import words


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["eval", *(str(a) for a in arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of models: language (raw and packed), encoder, texts and images (classifiers), and data."""
    root = tmp_path_factory.mktemp("eval")
    for name, task in (("language", "language-modeling"), ("encoder", "embeddings"), ("texts", "text-classification")):
        task_folder(root / name, task)
    task_folder(root / "images", "image-classification")
    packed(root / "language", 32.0)
    packed(root / "language", 2.0)
    words(root / "text", 40)
    words(root / "labelled", 40, answers=["good", "bad"])
    pictures(root / "pictures", 6, "cat", "dog")
    return root


@pytest.fixture(autouse=True)
def in_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def rows(result: Result) -> dict[str, list[str]]:
    """Return the cells of each model's row."""
    lines = [line.split() for line in result.output.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if len(cells) > 3}


def test_language_models_in_one_table(root: Path) -> None:
    arguments = ["language", "packed-32", "packed-2", "--text", "text", "--context", 16, "--tokens", 64]
    text = run(*arguments)
    assert "language-modeling on text: 60 tokens scored, context 16, windows without overlap" in text.output
    table = rows(text)
    assert list(table)[-3:] == ["language", "packed-32", "packed-2"]
    assert table["packed-32"][-3:] == ["0.000", "0.000", "100.00%"] and table["packed-32"][3] == table["language"][3]
    document = json.loads(run(*arguments, "--json").stdout)
    assert document["task"] == "language-modeling" and document["original"]["path"] == "language"
    assert [v["path"] for v in document["variants"]] == ["packed-32", "packed-2"]
    two = document["variants"][1]
    assert two["kl_mean"] > 0 and two["context"] == 16 and two["tokens"] == 60
    assert two["file_bytes"] == (root / "packed-2" / "model.safetensors").stat().st_size
    whole = run("language", "packed-2", "--text", "text", "--context", 4096)
    assert "189 tokens scored, context 64" in whole.output  # the model takes 64


def test_other_models() -> None:
    text = run("encoder", "encoder", "--text", "text")
    assert "38 lines" in text.output and "pooling mean" in text.output
    assert rows(text)["encoder"][-4:] == ["0.00000", "0.00000", "100.00%", "100.00%"]
    assert "labels given" in run("texts", "texts", "--text", "labelled").output
    assert "accuracy" not in run("texts", "texts", "--text", "text").output
    text = run("images", "images", "--images", "pictures")
    assert "6 images, labels given" in text.output and rows(text)["images"][3] == "100.00%"
    assert "38 lines" in run("language", "language", "--text", "text", "--task", "embeddings").output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["language"], 2, "Missing argument 'PACKED...'"),
        (["language", "language"], 2, "language: language-modeling is measured on a file: give --text"),
        (
            ["images", "images", "--text", "text"],
            2,
            "images: image-classification is measured on a folder: give --images",
        ),
        (["texts", "texts", "--text", "text", "--images", "pictures"], 2, "give --text FILE, and no other data"),
        (["language", "language", "--text", "nothing"], 2, "does not exist"),
        (["language", "language", "--text", "text", "--task", "chess"], 2, "'chess' is not one of"),
        (["nothing", "language", "--text", "text"], 1, "nothing: no such file or folder, and not a hub id (org/name)"),
        (["language", "nothing", "--text", "text"], 1, "nothing: no such file or folder, and not a hub id (org/name)"),
        (
            ["pictures", "language", "--text", "text"],
            1,
            "pictures: no config.json to be had; expected a Hugging Face folder",
        ),
        (["language", "texts", "--text", "text"], 1, "texts: lacks cls.predictions"),
        (["texts", "texts", "--text", "short"], 1, "short: has no lines of text"),
        (["encoder", "encoder", "--text", "short"], 1, "short: has no lines of text"),
        (["language", "language", "--text", "short"], 1, "the text gives 0 tokens; at least two are needed"),
        (
            ["audio", "audio", "--text", "text"],
            1,
            "audio: a WhisperForConditionalGeneration is for none of the tasks text-",
        ),
    ],
)
def test_mistakes_get_one_clear_line(root: Path, arguments: list[str], code: int, message: str) -> None:
    (root / "short").write_text("\n")
    (root / "audio").mkdir(exist_ok=True)
    (root / "audio" / "config.json").write_text('{"architectures": ["WhisperForConditionalGeneration"]}')
    result = run(*arguments, code=code)
    assert isinstance(result.exception, SystemExit), "no error but seedpack's own"
    assert message in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100_000, 40))
    monkeypatch.setattr("seedpack.cli.output.time.perf_counter", lambda: float(next(clock)))
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    assert "Embedding: 42%, 0.1 lines/s" in run("encoder", "encoder", "--text", "text").stderr
