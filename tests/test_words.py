"""Docstrings say what code does, in sentences with a verb; and sizes are in bits per weight."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FRAGMENT = re.compile(r"\s*(What|Of|Whether|As)\b")
BITS = re.compile("bits a " + "weight", re.IGNORECASE)
LIBRARY = [path for folder in ("seedpack", "cli", "formats") for path in (ROOT / folder).rglob("*.py")]
FOLDERS = ("seedpack", "cli", "formats", "docs", "benchmarks", "examples", "tests")
TEXTS = [*ROOT.glob("*.md"), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.[mp][dy]"))]


def fragments(source: str) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return [text.splitlines()[0] for text in texts if FRAGMENT.match(text)]


def test_docstrings_are_sentences() -> None:
    found = [f"{path.relative_to(ROOT)}: {line}" for path in LIBRARY for line in fragments(path.read_text("utf-8"))]
    assert not found


@pytest.mark.parametrize("word", ["What", "Of", "Whether", "As"])
def test_a_fragment_is_found(word: str) -> None:
    assert fragments(f'def f():\n    """{word} it is."""') == [f"{word} it is."]
    assert not fragments('def f():\n    """Offer an assessment."""')


def test_bits_are_per_weight() -> None:
    assert not [str(path.relative_to(ROOT)) for path in TEXTS if BITS.search(path.read_text("utf-8"))]
