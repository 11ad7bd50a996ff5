"""seedpack push."""

from __future__ import annotations

from pathlib import Path

import click

from seedpack.cli import output


@click.command("push")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made.")
@click.option("--base-model", metavar="ID", help="Hub id of the original, for the card. Default: the one in the card.")
@click.option(
    "--with-code",
    is_flag=True,
    help="Add a modelling file of a few lines: with trust_remote_code=True it says what is to be installed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(folder: Path, repo: str, private: bool, base_model: str | None, with_code: bool, as_json: bool) -> None:
    """Upload the packed FOLDER to the Hugging Face hub as REPO, with its model card.

    `seedpack eval ORIGINAL FOLDER --text FILE --card` writes what was measured into the card first.
    """
    from seedpack.hf.card import CARD, write_card
    from seedpack.hf.push import push, write_code

    output.quiet_transformers()
    if with_code:
        write_code(folder)
    if base_model is not None or not (folder / CARD).exists():
        write_card(folder, base_model=base_model)
    address = push(folder, repo, private=private)
    if as_json:
        output.show_json({"folder": str(folder), "repo": repo, "address": address})
    else:
        output.echo(f"uploaded: {address}")
