"""The command `seedpack merge`."""

from __future__ import annotations

import click

from seedpack.cli import output as screen
from seedpack.cli.shards import read_command


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
