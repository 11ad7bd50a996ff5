"""The command `seedpack merge`."""

from __future__ import annotations

import click

from seedpack.cli import compress
from seedpack.cli import output as screen
from seedpack.cli.shards import read_command


@click.command("merge")
@click.argument("output")
@screen.trust_option
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(output: str, trust_remote_code: bool, force: bool, as_json: bool) -> None:
    """Write OUTPUT, whose tensors all shards of `seedpack compress … -o OUTPUT --shard I/N` have fitted.

    Model and options are those of the shards; code in the model's folder has to be trusted again.
    """
    from seedpack.formats.places import place

    path = place(output)
    model, state, given = read_command(path, [str(option.name) for option in compress.command.params])
    with screen.stages() as progress:
        progress("Starting", 0, 0)
        import torch

        from seedpack.converter.pipeline import merge
        from seedpack.converter.sources.open import open_source
        from seedpack.converter.trust import trusting_remote_code
        from seedpack.errors import ModelError

        screen.quiet_transformers()
        edits, fitted_on = given.pop("plan"), str(given["device"]).partition(":")[0]
        if fitted_on == "cuda" and not torch.cuda.is_available():
            given["device"] = "cpu"
        options = compress.options_of(**given, key_file=None, trust_remote_code=trust_remote_code, force=force)
        with trusting_remote_code(trust_remote_code):
            source = open_source(model, state_key=options.state_key)
        if source.state != state:
            raise ModelError(f"{model}: its files are not as the shards found them; run the shards again")
        report = merge(source, path, options, plan=edits, fitted_on=fitted_on, progress=progress)
    screen.show_json(report.to_json()) if as_json else compress.show_report(report, options)
