"""seedpack report."""

from __future__ import annotations

from pathlib import Path

import click

from seedpack.cli import output as screen


@click.command("report")
@click.argument("packed", type=click.Path(exists=True, path_type=Path))
@click.argument("original", required=False)
@click.option(
    "-o", "--output", default="report.html", show_default=True, type=click.Path(path_type=Path), help="Page to write."
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text file, for what is lost by position and what both models write; needs ORIGINAL.",
)
@click.option("--context", default=1024, show_default=True, type=click.IntRange(2), help="Tokens per window or line.")
@click.option("--tokens", default=4096, show_default=True, type=click.IntRange(2), help="Tokens of the text to use.")
@click.option("--force", is_flag=True, help="Replace an existing page.")
@screen.key_option
@screen.trust_option
def command(
    packed: Path, original: str | None, output: Path, text: Path | None, context: int, tokens: int, force: bool,
    trust_remote_code: bool,
) -> None:  # fmt: skip
    """Write a page about the model PACKED: sizes, bits, and beside ORIGINAL errors, spectra, and quality.

    The page is one file, and loads nothing from anywhere.
    """
    from seedpack.converter.trust import trusting_remote_code
    from seedpack.page.page import write_page

    screen.quiet_transformers()
    with trusting_remote_code(trust_remote_code), screen.stages() as progress:
        write_page(packed, output, original, text=text, context=context, tokens=tokens, force=force, progress=progress)
    screen.echo(f"{output}: {screen.size(output.stat().st_size)}")
