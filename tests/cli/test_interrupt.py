"""An interrupt ends the program at once, and yet closes what it met at its entry."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import contextlib, sys
import click
from seedpack.cli import main

@contextlib.contextmanager
def held():
    try:
        yield
    finally:
        print("closed", flush=True)

def interrupted_at_its_entry():
    manager = held()
    manager.__enter__()
    raise KeyboardInterrupt

@click.command()
def command():
    interrupted_at_its_entry()

main.cli, sys.argv = command, ["seedpack"]
main.main()
"""


def test_what_is_interrupted_at_its_entry_is_closed() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (130, "closed", "Interrupted.")
