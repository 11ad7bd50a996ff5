"""The page of a packed model: what stands on it, that nothing in it can be run or fetched, and how a real browser shows it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import seedpack
from benchmarks.lib import browser
from seedpack.cli.main import cli
from seedpack.errors import ModelError, OutputError
from seedpack.eval.evaluate import evaluate
from seedpack.page.charts import bars, grid, lines
from seedpack.page.page import write_page
from tests.helpers.task_folders import packed, task_folder
from tests.helpers.tokenizers import words


class Elements(HTMLParser):
    """All elements with their attributes, and that each is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    task_folder(root / "model", "language-modeling")
    packed(root / "model", 3.0)
    words(root / "text", 60)
    write_page(root / "packed-3", root / "report.html", root / "model", text=root / "text", context=48, tokens=480)
    return root


def test_what_stands_on_it(root: Path) -> None:
    text = (root / "report.html").read_text("utf-8")
    elements = Elements(text)
    assert not elements.open and text.count("<svg") >= 6
    for title in ("Size by layer", "Bits per weight, by layer and depth", "Relative error, by layer and depth", "The worst",
                  "Spectra of the original", "Effective rank by depth", "Quality", "KL divergence by position",
                  "Side by side, greedily", "All tensors"):  # fmt: skip
        assert f"<h2>{title}" in text
    found = evaluate(root / "model", [root / "packed-3"], root / "text", context=48, tokens=480)
    report: Any = found.packed[0][1]
    assert f"<td>kl mean</td><td>{report.kl_mean:.5g}</td>" in text
    assert re.search(r"mlp.down_proj.*?<title>mlp.down_proj, 1: 3\.\d+</title>", text, re.DOTALL)
    names = re.findall(r"<td>(model[\w.]+|lm_head[\w.]+)</td>", text.partition("<h2>All tensors")[2])
    with seedpack.formats.Checkpoint(root / "packed-3") as checkpoint:
        assert set(names) == set(checkpoint.manifest.tensors)


def test_it_loads_nothing(root: Path) -> None:
    elements = Elements((root / "report.html").read_text("utf-8"))
    addresses = [
        value for _, attributes in elements.found for key, value in attributes.items() if key in ("src", "href")
    ]
    assert addresses == ["data:,"]
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in elements.found)


def test_names_are_text(tmp_path: Path) -> None:
    """Names of tensors come from files of others."""
    name = '<img src=x onerror="alert(1)">.0.\u202eweight'
    seedpack.compress({name: torch.randn(64, 64), "other.weight": torch.randn(64, 64)}, tmp_path / "a.safetensors")
    write_page(tmp_path / "a.safetensors", tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text("utf-8")
    assert "<img" not in text and "\u202e" not in text and "&lt;img src=x" in text
    assert "Errors and spectra are shown where the original is named too." in text


def test_what_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists"):
        write_page(root / "packed-3", root / "report.html")
    with pytest.raises(ModelError, match=r"page.txt: a page is a file that ends in .html"):
        write_page(root / "packed-3", tmp_path / "page.txt")
    with pytest.raises(ModelError, match="a text is for comparing: name the original too"):
        write_page(root / "packed-3", tmp_path / "page.html", text=root / "text")
    assert not list(tmp_path.iterdir())


def test_the_command(root: Path, tmp_path: Path) -> None:
    arguments = ["report", str(root / "packed-3"), str(root / "model"), "-o", str(tmp_path / "r.html")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0 and "r.html: " in result.output, result.output
    assert "KL divergence by position" not in (tmp_path / "r.html").read_text("utf-8")


def test_charts_of_little() -> None:
    assert lines({"a": []}, "x", "y") == "" and lines({"a": [(0, 0)]}, "x", "y", log=True) == ""
    for drawn in (lines({"a": [(1, 2)]}, "x", "y"), bars({"<b>": 0.0}, ""), grid({"a": {0: 1.0}}, "")):
        assert not Elements(drawn).open and "nan" not in drawn and "<b>" not in drawn


@pytest.mark.slow
@pytest.mark.skipif(not browser.CHROMIUM, reason="needs chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_in_a_browser(root: Path, width: int) -> None:
    """No error on the console, nothing wider than the screen, and tables that sort."""
    script = """
    document.querySelectorAll("th button")[2].click();
    const cells = [...document.querySelectorAll("table")[0].tBodies[0].rows].map(row => Number(row.cells[2].dataset.v));
    document.title = JSON.stringify([cells.every((v, i) => !i || cells[i - 1] >= v), document.body.scrollWidth <= innerWidth]);
    """
    assert browser.shown(root / "report.html", script, width=width) == ("[true,true]", [])
