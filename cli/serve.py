"""The command `seedpack serve`."""

from __future__ import annotations

from pathlib import Path

import click

from seedpack.cli import output
from seedpack.cli.checks import check_folder


@click.command("serve", context_settings={"ignore_unknown_options": True})
@click.argument("packed", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def command(packed: Path, options: tuple[str, ...]) -> None:
    """Serve the language model in the folder PACKED over OpenAI's HTTP API, by `transformers serve`.

    OPTIONS are that program's: --port, --host, --device, --continuous-batching and more. It serves one request at a time
    unless told otherwise; for many at once use vLLM, which finds seedpack by itself.
    """
    check_folder(packed)
    from seedpack.hf.internals import serving

    with output.waiting(f"Starting transformers' server for {packed}"):
        serve = serving()
    serve([str(packed), *options])
