"""The page of attacks names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text("utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))


def test_tests_are_named() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| attack")]
    assert len(rows) > 20 and all("::" in row for row in rows), "each attack has a test"


@pytest.mark.parametrize(("file", "name"), NAMED, ids="::".join)
def test_each_test_exists(file: str, name: str) -> None:
    tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_each_place_exists() -> None:
    places = re.findall(r"`((?:formats|seedpack|cli)/[\w/]+\.py)`", PAGE)
    assert places and all((ROOT / place).is_file() for place in places)
