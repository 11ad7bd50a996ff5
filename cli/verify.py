"""The command `seedpack verify`."""

from __future__ import annotations

import sys

import click

from seedpack.cli import output


@click.command("verify")
@click.argument("packed")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(packed: str, as_json: bool) -> None:
    """Check every byte of the checkpoint PACKED against its digests; exit 1 and name the tensors if any differ."""
    from seedpack.errors import SeedpackError
    from seedpack.formats import Checkpoint
    from seedpack.loader.dense import stored_parts

    with Checkpoint(packed) as checkpoint:
        damaged: list[dict[str, str]] = []
        count = 0
        with output.progress("Verifying", len(checkpoint.manifest.tensors), "tensors") as advance:
            for name, error in checkpoint.verify():
                count += 1
                advance(name, 1)
                try:
                    if error is not None:
                        raise error
                    stored_parts(checkpoint, name)  # parts that the codec cannot have written are damaged too
                except SeedpackError as problem:
                    damaged.append({"tensor": name, "error": str(problem)})
        undescribed = len(checkpoint.raw_keys())
        stored = checkpoint.stored_bytes
    if as_json:
        output.show_json({"tensors": count, "bad": damaged, "without_digest": undescribed})
    else:
        for entry in damaged:
            click.echo(output.printable(entry["error"]), err=True)
        note = f"; {undescribed} raw tensors have no digest (saved again by transformers)" if undescribed else ""
        verdict = (
            f"{len(damaged)} of {count} tensors are damaged" if damaged else f"all {count} tensors match their digests"
        )
        click.echo(f"{packed}: {verdict} ({output.size(stored)}){note}")
    if damaged:
        sys.exit(1)
