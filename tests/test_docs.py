"""The documentation holds: links lead somewhere, figures and layers are those that are measured and tested.

`python -m tests.test_docs` writes the layers into CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import seedpack
from tests.helpers.layers import LAYERS
from tests.test_code_blocks import code_blocks

ROOT = Path(__file__).resolve().parent.parent
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
GUIDES = ("quick-start", "commands", "hugging-face", "calibration", "budgets", "training", "fast-feedforward", "images")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_begins_with_an_example(guide: str) -> None:
    assert re.match(r"# .*\n\n```", (ROOT / "docs" / f"{guide}.md").read_text("utf-8"))


def names_of_seedpack(block: str) -> set[str]:
    """Return the names that Python code takes from the package itself, as `load` of `seedpack.load`."""
    tree = ast.walk(ast.parse(block))
    return {
        n.attr
        for n in tree
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "seedpack"
    }


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_blocks_use_names_that_exist(page: Path) -> None:
    for language, block in code_blocks(page):
        if language == "python":
            assert names_of_seedpack(block) <= {*seedpack.__all__, "nn", "reparam", "image"}


def test_benchmarks_use_names_that_exist() -> None:
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_the_reference_is_what_the_docstrings_say() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text("utf-8") == module.page(), "python docs/api.py"


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("https://", "http://")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{link}: no such file"
            assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("guide", GUIDES)
def test_paragraphs_are_short(guide: str) -> None:
    text = re.sub(
        r"^```.*?^```$", "", (ROOT / "docs" / f"{guide}.md").read_text("utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    long = [part for part in text.split("\n\n") if len(part) > 480 and not part.lstrip().startswith(("|", "- "))]
    assert not long, "more than four lines of 120 characters"


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 700
    assert len(re.findall(r"^\|", text, flags=re.MULTILINE)) <= 12


def test_figures_are_those_of_the_result_files() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.results", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def with_layers(text: str) -> str:
    """Return CONTRIBUTING.md with the layers of the test that holds them."""
    opening, closing = "<!-- layers -->", "<!-- end layers -->"
    before, _, rest = text.partition(opening)
    lines = "\n".join(f"    {', '.join(sorted(layer))}" for layer in LAYERS)
    return f"{before}{opening}\n{lines}\n{closing}{rest.partition(closing)[2]}"


def test_contributing_has_the_layers() -> None:
    text = CONTRIBUTING.read_text("utf-8")
    assert text == with_layers(text), "run `python -m tests.test_docs`"


if __name__ == "__main__":
    CONTRIBUTING.write_text(with_layers(CONTRIBUTING.read_text("utf-8")), "utf-8")
