"""The command `seedpack codecs`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from seedpack.cli import output
from seedpack.errors import first_line


@click.command("codecs")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the installed codecs, also those of plug-ins: the bits per weight and the settings that they take.

    A setting is given to compress by --set NAME=VALUE; without a default it must be.
    """
    from seedpack.codecs.registry import codec_ids

    rows = [_row(id) for id in codec_ids()]
    if as_json:
        output.show_json(rows)
        return
    for row in rows:
        settings = [*row["required"], *(f"{name}={json.dumps(value)}" for name, value in row["settings"].items())]
        pairs = [("bits per weight", row["bits"]), ("settings", ", ".join(settings)), ("from", row["module"])]
        output.show_pairs(f"{row['id']}: {row['summary']}", [pair for pair in pairs if pair[1]])


def _row(id: str) -> dict[str, Any]:
    from seedpack.codecs.names import BITS
    from seedpack.codecs.registry import get_codec

    try:
        codec = get_codec(id)
    except Exception as error:  # a plug-in's own
        nothing: dict[str, Any] = {"version": None, "bits": "", "required": [], "settings": {}, "module": ""}
        return {"id": id, "summary": f"cannot be imported: {first_line(error)}", **nothing}
    fields = {field.name: field.default for field in dataclasses.fields(codec)}
    return {
        "id": id,
        "version": codec.version,
        "summary": codec.summary or (codec.__doc__ or "").strip().partition("\n")[0],
        "bits": BITS.get(id, "any" if hasattr(codec, "from_bits") else "not to be chosen"),
        "required": [name for name, default in fields.items() if default is dataclasses.MISSING],
        "settings": {name: default for name, default in fields.items() if default is not dataclasses.MISSING},
        "module": codec.__module__,
    }
