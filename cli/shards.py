"""The record of what the shards of an output were begun with."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

# Options that shards may differ in, and what nobody else's record may say: which code is trusted, and which key is read.
OWN = frozenset({"jobs", "force", "as_json", "engine", "address", "trust_remote_code", "key_file"})
WORDS = ("none", "self", "auto")


def keep_command(path: Path, model: str, state: str, given: dict[str, Any]) -> None:
    """Keep what shards of an output are begun with, for those to come and for `merge`.

    Args:
        path: of the output.
        model: as it was given.
        state: of the model's files.
        given: the options.

    Raises:
        OptionError: others were begun with something else.
    """
    from seedpack.errors import OptionError

    options = {name: value for name, value in given.items() if name not in OWN}
    options["device"] = str(options["device"]).partition(":")[0]
    for name in ("plan", "calibration"):
        _, own, file = str(options[name]).rpartition("self+")
        if file not in ("None", *WORDS) and Path(file).exists():
            options[name] = own + os.path.abspath(file)
    mine = {"model": os.path.abspath(model) if Path(model).exists() else model, "state": state, "options": options}
    document = json.loads(json.dumps(mine, default=str))
    begun = _read(path, options)
    if begun is None:
        _write(path, json.dumps(document, indent=1), options)
        begun = _read(path, options) or document
    if begun == document:
        return
    differs = [name for name in options if begun["options"].get(name) != document["options"].get(name)]
    if not differs:
        what = (
            "model"
            if begun["model"] != document["model"]
            else "state of the model's files (of a copy, or changed since)"
        )
        differs = [what]
    raise OptionError(
        f"{path}: shards were begun with another {', '.join(differs)}; give the same, or remove {_record(path).parent.parent}"
    )


def read_command(path: Path, names: Collection[str]) -> tuple[str, str, dict[str, Any]]:
    """Return the model, the state of its files and the options that shards of an output were begun with.

    Args:
        path: of the output.
        names: of all options of `compress`.

    Raises:
        ModelError: none was begun, or the record cannot be read.
    """
    from seedpack.errors import ModelError

    begun = _read(path, set(names) - OWN - {"model", "output", "dry_run", "shard", "repo"})
    if begun is None:
        raise ModelError(
            f"{path}: no shard of it was begun here; run seedpack compress MODEL -o {path} --shard 1/2, and so on"
        )
    return begun["model"], begun["state"], {**begun["options"], "settings": tuple(begun["options"]["settings"])}


def _read(path: Path, names: Collection[str]) -> dict[str, Any] | None:
    """Return a record; None where there is none, or it cannot be read."""
    from seedpack.formats.places import is_remote, reaching

    record = _record(path)
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        if is_remote(record):
            with reaching(record):
                text = record.read_bytes() if record.exists() else b""
        else:
            text = record.read_bytes()
        begun = json.loads(text)
        if all(isinstance(begun[key], str) for key in ("model", "state")) and begun["options"].keys() == set(names):
            return begun  # type: ignore[no-any-return]
    return None


def _write(path: Path, text: str, names: Collection[str]) -> None:
    """Write a record where none can be read; the first of several processes wins."""
    from seedpack.formats.places import is_remote, reaching

    record = _record(path)
    if is_remote(record):
        with reaching(record):
            record.write_text(text)
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    partial = record.with_name(f".command.{os.getpid()}-{secrets.token_hex(4)}.partial")
    partial.write_text(text)
    try:
        os.link(partial, record)
    except FileExistsError:
        if _read(path, names) is None:
            os.replace(partial, record)
    finally:
        partial.unlink(missing_ok=True)


def _record(path: Path) -> Path:
    from seedpack.formats.staging import kept_of

    return kept_of(path) / "command.json"
