"""The command `seedpack merge`, and the record of what shards were begun with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from seedpack.cli import output as screen

OWN = ("jobs", "force", "as_json", "engine", "address")  # options that shards may differ in
PATHS = ("plan", "key_file", "calibration")


@click.command("merge")
@click.argument("output")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(output: str, force: bool, as_json: bool) -> None:
    """Write OUTPUT, whose tensors all shards of `seedpack compress … -o OUTPUT --shard I/N` have fitted."""
    from seedpack.formats.places import place

    path = place(output)
    model, given = read_command(path)
    with screen.stages() as progress:
        progress("Starting", 0, 0)
        import torch

        from seedpack.cli.compress import options_of, show_report
        from seedpack.converter.pipeline import merge

        screen.quiet_transformers()
        edits, fitted_on = given.pop("plan"), str(given["device"]).partition(":")[0]
        if fitted_on == "cuda" and not torch.cuda.is_available():
            given["device"] = "cpu"
        options = options_of(**given, jobs=1, force=force)
        report = merge(model, path, options, plan=edits, fitted_on=fitted_on, progress=progress)
    screen.show_json(report.to_json()) if as_json else show_report(report, options)


def keep_command(path: Path, model: str, given: dict[str, Any]) -> None:
    """Keep what shards of an output are begun with, for those to come and for `merge`.

    Raises:
        OptionError: others were begun with something else.
    """
    from seedpack.converter.journal import write_file
    from seedpack.errors import OptionError

    options = {name: value for name, value in given.items() if name not in OWN}
    for name in PATHS:
        if options[name] is not None and Path(options[name]).exists():
            options[name] = os.path.abspath(options[name])
    mine = {"model": os.path.abspath(model) if Path(model).exists() else model, "options": options}
    document = json.loads(json.dumps(mine, default=str))
    record = _record(path)
    if not record.exists():
        write_file(record, lambda partial: partial.write_text(json.dumps(document, indent=1)))
    begun = json.loads(record.read_text())
    if begun != document:
        differs = [name for name in options if begun["options"].get(name) != document["options"].get(name)]
        raise OptionError(
            f"{path}: shards were begun with another {', '.join(differs) or 'model'}; give the same, or remove {record.parent.parent}"
        )


def read_command(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the model and the options that shards of an output were begun with.

    Raises:
        ModelError: none was begun, or the record cannot be read.
    """
    from seedpack.errors import ModelError

    record = _record(path)
    if not record.exists():
        raise ModelError(
            f"{path}: no shard of it was begun here; run seedpack compress MODEL -o {path} --shard 1/2, and so on"
        )
    try:
        begun = json.loads(record.read_text())
        return str(begun["model"]), {**begun["options"], "settings": tuple(begun["options"]["settings"])}
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{record}: cannot be read; run a shard again, which writes it") from None


def _record(path: Path) -> Path:
    from seedpack.formats.staging import kept_of

    return kept_of(path) / "command.json"
