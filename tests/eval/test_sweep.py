from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from seedpack.cli.main import cli
from seedpack.errors import OptionError, OutputError
from seedpack.eval import sweep as sweeping
from seedpack.eval.evaluate import Evaluation, evaluate, evaluate_each
from seedpack.eval.sweep import plot, sweep
from tests.helpers.task_folders import task_folder
from tests.helpers.tokenizers import words

FAST: Any = {"settings": {"effort": "fast"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    words(folder / "text", 60)
    words(folder / "other", 50)
    return task_folder(folder / "model", "language-modeling")


def test_a_frontier_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, measured = [model.parent / "text", model.parent / "other"], []

    def counted(*arguments: Any, **named: Any) -> list[Evaluation]:
        measured.append(arguments[1])
        return evaluate_each(*arguments, **named)

    monkeypatch.setattr(sweeping, "evaluate_each", counted)
    first = sweep(model, tmp_path / "out", [4, 2], texts, context=16, tokens=64, **FAST)
    assert len(measured) == 2 and [Path(evaluation.data).name for evaluation in first] == ["text", "other"]
    two, four = (report for _, report in first[0].packed)
    assert two.kl_mean > four.kl_mean > 0  # type: ignore[union-attr]
    again = sweep(model, tmp_path / "out", [4, 2.5, 2], texts, context=16, tokens=64, **FAST)
    assert len(measured) == 3 and [again[1].packed[i] for i in (0, 2)] == list(first[1].packed)
    alone = evaluate(model, [tmp_path / "out/4-bits"], texts[0], context=16, tokens=64)
    assert again[0].packed[2] == alone.packed[0]
    plot(again, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_refused(model: Path, tmp_path: Path) -> None:
    texts = [model.parent / "text"]
    with pytest.raises(OptionError, match="bits must be some numbers, each once, got 3, 3"):
        sweep(model, tmp_path / "a", [3, 3], texts)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_text("")
    with pytest.raises(OutputError, match="exists already, and is no sweep; name another folder"):
        sweep(model, tmp_path / "a", [3], texts)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/sweep.json").write_text("{")
    with pytest.raises(OutputError, match=r"sweep.json: cannot be read \(JSONDecodeError\); remove it"):
        sweep(model, tmp_path / "b", [3], texts)
    sweep(model, tmp_path / "c", [3], texts, context=16, tokens=32, **FAST)
    with pytest.raises(OutputError, match=r"was made with another tokens \(32\); name another folder"):
        sweep(model, tmp_path / "c", [3], texts, context=16, tokens=64, **FAST)


def test_the_command(model: Path, tmp_path: Path) -> None:
    def run(*more: str, code: int = 0) -> str:
        arguments = ["sweep", str(model), "-o", str(tmp_path / "out"), "--text", str(model.parent / "text")]
        result = CliRunner().invoke(cli, [*arguments, "--effort", "fast", "--context", "16", "--tokens", "64", *more])
        assert result.exit_code == code, result.output
        return result.stdout if "--json" in more else result.output

    (document,) = json.loads(run("--bits", "2,4", "--json"))
    two, four = document["variants"]
    assert two["bits_per_weight"] < four["bits_per_weight"] and two["kl_mean"] > four["kl_mean"]
    assert json.loads(json.dumps(Evaluation.from_json(document).to_json())) == document
    assert "'auto'" in json.loads((tmp_path / "out/sweep.json").read_text())["about"]["options"]["calibration"]
    table = run("--bits", "2,4")
    assert "language-modeling on" in table and "plot:" in table and (tmp_path / "out/sweep.png").exists()
    assert "'2;4' is no list of numbers, as 2,2.5,3,4" in run("--bits", "2;4", code=2)
    assert "bits" in run("--bits", "99", code=2)
