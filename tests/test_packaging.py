"""The explicit package list against the disk, and the links that tools need."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import seedpack

ROOT = Path(__file__).resolve().parent.parent


def on_disk() -> set[str]:
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "seedpack").rglob("__init__.py")}
    for folder in ("cli", "formats"):
        found |= {
            "seedpack." + ".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / folder).rglob("__init__.py")
        }
    return found


def test_package_list_is_complete() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = config["tool"]["setuptools"]["packages"]
    assert listed == sorted(set(listed))
    assert set(listed) == on_disk()
    assert config["project"]["version"] == seedpack.__version__


def test_links() -> None:
    for name in ("cli", "formats"):
        link = ROOT / "seedpack" / name
        assert link.is_symlink() and link.resolve() == ROOT / name


def test_codec_entry_points() -> None:
    from seedpack.codecs.registry import codec_ids, get_codec

    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(config["project"]["entry-points"]["seedpack.codecs"]) == codec_ids()
    for id, target in config["project"]["entry-points"]["seedpack.codecs"].items():
        cls = get_codec(id)
        assert f"{cls.__module__}:{cls.__qualname__}" == target


def test_nobody_is_told_to_install_another_package() -> None:
    """The name `seedpack` is another's on PyPI."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] == "seedpack-torch"
    wrong = re.compile(r"pip install[^\n|;]*?\bseedpack\b(?!-torch)", re.IGNORECASE)
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in found:
        path = ROOT / name
        if (
            name
            and "corpus" not in path.parts
            and path.is_file()
            and path.suffix in {".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".ipynb", ""}
        ):
            assert not wrong.search(path.read_text("utf-8")), name
