"""Each target over its corpus, and over what once ended in another error, without atheris."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from jaxtyping import TypeCheckError

from seedpack.errors import SeedpackError
from tests.fuzz import targets
from tests.fuzz.__main__ import CORPUS, Run, cells
from tests.fuzz.containers import remove_files
from tests.fuzz.draws import Draws, edited


@pytest.fixture(scope="module", autouse=True)
def _files() -> Iterator[None]:
    yield
    remove_files()


@pytest.mark.parametrize("target", targets.TARGETS)
def test_corpus(target: str) -> None:
    inputs = sorted((CORPUS / target).iterdir())
    assert inputs, "a target needs an input that is sound"
    for path in inputs:
        with suppress(TypeCheckError):  # of pytest alone: settings of another type, before the codec refuses them
            targets.run(target, path.read_bytes())


@pytest.mark.parametrize("target", targets.TARGETS)
def test_sound_inputs_are_accepted(target: str) -> None:
    """Else a target reaches nothing."""
    for path in (CORPUS / target).glob("sound*"):
        targets.TARGETS[target](path.read_bytes())


def test_the_corpus_is_small() -> None:
    assert {path.name for path in CORPUS.iterdir()} == targets.TARGETS.keys()
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 200_000


def test_any_bytes_are_a_program_of_changes() -> None:
    document = {"a": [1, 2, {"b": None}], "c": "d"}
    assert edited(document, Draws(b"")) == document
    results = [str(edited(document, Draws(bytes((7 * i * k) % 256 for k in range(1, 40))))) for i in range(60)]
    assert len(set(results)) > 30 and document == {"a": [1, 2, {"b": None}], "c": "d"}


def test_a_run_counts_and_keeps_what_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def target(name: str, data: bytes) -> None:
        if data == b"bad":
            raise KeyError(data)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os._exit", lambda code: None)
    run = Run("header", 3, target)
    for data in (b"good", b"bad", b"bad"):
        run.one(data)
    (path,) = Path("findings/header").iterdir()
    assert path.read_bytes() == b"bad"
    row = capsys.readouterr().out
    assert re.search(r'\["header", 3, .*"KeyError at test_targets.py:\d+"', row)
    assert cells(["header", 3, 1.0, 0.5, 7.0, run.findings])[-1] == "1"


def test_own_errors_are_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: bytes) -> None:
        raise SeedpackError("no")

    monkeypatch.setitem(targets.TARGETS, "refuse", refuse)
    targets.run("refuse", b"")
