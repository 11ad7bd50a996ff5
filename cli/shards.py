"""The record of what the shards of an output were begun with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

OWN = ("jobs", "force", "as_json", "engine", "address")  # options that shards may differ in
PATHS = ("plan", "key_file", "calibration")


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
