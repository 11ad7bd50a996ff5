"""Names from files on a terminal: none can break the output, take the terminal's title or forge a line."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import seedpack
from seedpack.cli import output
from seedpack.cli.main import cli

NAMES = ("a[/nope]b", "\x1b]0;PWNED\x07", "c\r\nall 9 tensors match\u202e\u200f\u061c", ":smile:[bold]d")
FORGED = re.compile(r"\x1b\]|\x07|[\u202e\u200f\u061c]|^all 9 tensors", re.MULTILINE)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save({f"{name}.weight": torch.randn(8, 8) for name in NAMES}, "net.pt")
    bad = {f"{name}.weight": torch.full((8, 8), torch.nan) for name in NAMES}
    torch.save({**bad, "\x1b[2J": "left out"}, "nan.pt")
    seedpack.compress("net.pt", "packed", codec="svd", settings={"rank": 2})
    data = bytearray(Path("packed").read_bytes())
    data[-1] ^= 1
    Path("damaged").write_bytes(data)
    Path("\x1b]0;PATH\x07").write_bytes(Path("packed").read_bytes())
    return tmp_path


COMMANDS = {
    "compress": ["compress", "net.pt", "-o", "out", "--codec", "svd", "--set", "rank=2"],
    "dry run": ["compress", "net.pt", "--dry-run", "--codec", "svd", "--set", "rank=2"],
    "NaN": ["compress", "nan.pt", "-o", "out", "--codec", "svd", "--set", "rank=2"],
    "inspect": ["inspect", "packed"],
    "verify": ["verify", "packed"],
    "damage": ["verify", "damaged"],
    "compare": ["compare", "net.pt", "packed"],
    "load": ["load", "packed"],
    "limit": ["load", "packed", "--max-bytes", "10"],
    "unpack": ["unpack", "packed", "-o", "dense"],
    "path": ["verify", "\x1b]0;PATH\x07"],
    "no path": ["inspect", "\x1b]0;NONE\x07"],
    "no command": ["\x1b]0;NONE\x07"],
    "no option": ["verify", "--\x1b]0;NONE\x07"],
    "table": ["inspect", "\x1b]0;PATH\x07"],
}
FAILS = {"NaN": 1, "damage": 1, "limit": 1, "no path": 1, "no command": 2, "no option": 2}


@pytest.mark.parametrize("case", COMMANDS)
def test_without_a_terminal(case: str) -> None:
    result = CliRunner().invoke(cli, COMMANDS[case])
    assert result.exit_code == FAILS.get(case, 0), (result.output, result.exception)
    assert isinstance(result.exception, SystemExit | None)
    assert "\x1b" not in result.output and not FORGED.search(result.output)


@pytest.mark.parametrize("case", ["compress", "verify", "damage", "inspect"])
def test_on_a_terminal(case: str, folder: Path) -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "seedpack.cli", *COMMANDS[case]],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
        cwd=folder,
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 1 << 16)
        except OSError:  # what Linux says once nobody writes any more
            break
        if not chunk:
            break
        seen += chunk
    os.close(leader)
    text = seen.decode("utf-8", "replace")
    assert process.wait() == FAILS.get(case, 0) and "Traceback" not in text, text
    assert not FORGED.search(text) and "MarkupError" not in text


def test_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with output.progress("Verifying", len(NAMES), "tensors") as advance:
        for name in NAMES:
            advance(name, 1)
    assert not FORGED.search(screen.getvalue())


def test_names_stay_what_they_are_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_table(NAMES[0], ["tensor", "size"], [[name, name] for name in NAMES], NAMES[:2])
    output.show_pairs(NAMES[1], [("tensor", name) for name in NAMES])
    text = capsys.readouterr().out
    assert text.count("a[/nope]b") == 5 and text.count(":smile:[bold]d") == 3
    assert not FORGED.search(text)


def test_text_of_many_languages_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "où ?\tनमस्ते\n👩‍👩‍👧 می‌خواهم"
    output.echo(text, lines=True)
    assert capsys.readouterr().out == f"{text}\n"


def test_warnings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", output.show_warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", output.show_warning)
        warnings.warn(f"odd: {NAMES[1]}", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "Warning: odd: \N{REPLACEMENT CHARACTER}]0;PWNED\N{REPLACEMENT CHARACTER}\n"


def test_tables_lose_nothing_on_narrow_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    columns = ("model", "on disk", "bits per weight", "1 - cosine, mean", "largest", "same nearest", "same 10 nearest")
    rows = [
        ("dense", "98.7 kB", "33.519", "", "", "", ""),
        ("packed-4", "35.6 kB", "12.107", "0.00581", "0.00745", "94.74%", "92.89%"),
    ]
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as at a terminal
    for count in (1, 9):  # turned round, and too many rows for that
        output.show_table("of a kind", columns, [rows[0], *[rows[1]] * count])
        shown = capsys.readouterr().out
        for cell in (*columns[1:], *rows[1]):
            assert cell in shown, (count, cell)
