"""Read result files back: rows of JSON, tables of Markdown; and fill the blocks that are made from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "benchmarks"


def records(name: str) -> dict[str, dict[str, Any]]:
    """Return the rows of docs/benchmarks/NAME.json by label."""
    return {row["label"]: row for row in json.loads((FOLDER / f"{name}.json").read_text("utf-8"))}


def page(name: str) -> str:
    """Return the text of docs/benchmarks/NAME.md."""
    return (FOLDER / f"{name}.md").read_text("utf-8")


def tables(name: str) -> list[list[list[str]]]:
    """Return the tables of docs/benchmarks/NAME.md as rows of cells, the first row the columns' names."""
    found = re.findall(r"(?:^\|.*\n)+", page(name), flags=re.MULTILINE)
    split = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in found]
    return [[columns, *rows] for columns, _, *rows in split]


def rows(name: str, table: int = 0, keys: int = 1) -> dict[str, dict[str, str]]:
    """Return a table's rows by their first cells, each a dictionary of its cells by column."""
    columns, *body = tables(name)[table]
    found = {", ".join(cells[:keys]): dict(zip(columns, cells, strict=True)) for cells in body}
    if len(found) < len(body) or len(set(columns)) < len(columns):
        raise ValueError(f"table {table} of docs/benchmarks/{name}.md has rows or columns of the same name")
    return found


def sentence(name: str, pattern: str) -> str:
    """Return the first group of a pattern in a page; a page without it is an error."""
    found = re.search(pattern, page(name))
    if found is None:
        raise ValueError(f"docs/benchmarks/{name}.md has nothing that matches {pattern!r}")
    return found[1]


def divergence(found: dict[str, Any]) -> str:
    """Return a language report's KL divergence with its interval."""
    low, high = found["kl_interval"]
    return f"{found['kl_mean']:.4f} ± {(high - low) / 2:.4f}"


def markdown(columns: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """Return a text whose blocks between `<!-- NAME -->` and `<!-- end NAME -->` hold what is given for them."""
    for name, content in blocks.items():
        opening, closing = f"<!-- {name} -->", f"<!-- end {name} -->"
        if text.count(opening) != 1 or text.count(closing) != 1:
            raise ValueError(f"expected one block {opening} … {closing}")
        before, _, rest = text.partition(opening)
        text = f"{before}{opening}\n{content}\n{closing}{rest.partition(closing)[2]}"
    return text
