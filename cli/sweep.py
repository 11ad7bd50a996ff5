"""The command `seedpack sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from seedpack.cli import output
from seedpack.cli.checks import check_codec
from seedpack.errors import ModelError


def parse_bits(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, ...]:
    """Parse numbers with commas between them."""
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers, as 2,2.5,3,4") from None


@click.command("sweep")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder for all that is made. Default: MODEL-sweep.",
)
@click.option(
    "--bits", default="2,2.5,3,4", show_default=True, callback=parse_bits, help="Bits per weight, with commas."
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="Text file, or of image classifiers a folder of images; may be given again.",
)
@click.option("--codec", default="trellis", show_default=True, help="See seedpack codecs.")
@click.option("--effort", help="trellis: fast, default or best: how long to search.")
@click.option("--calibration", default="auto", show_default=True, metavar="TEXT", help="See seedpack compress.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes that fit.")
@click.option("--context", default=1024, show_default=True, type=click.IntRange(2), help="Tokens per window or line.")
@click.option("--tokens", default=16384, show_default=True, type=click.IntRange(2), help="Tokens of each text to use.")
@output.trust_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str, folder: Path | None, bits: tuple[float, ...], texts: tuple[Path, ...], as_json: bool, **given: Any
) -> None:
    """Pack MODEL at several bits per weight, and compare each with the original: a table, and a plot of the frontier.

    Interrupted, the same command goes on. The packed models stay in the folder, for use.
    """
    for count in bits:
        check_codec(given["codec"], count)
    from seedpack.cli.eval import show
    from seedpack.converter.options import Calibration, CompressOptions
    from seedpack.converter.trust import trusting_remote_code
    from seedpack.eval.sweep import plot, sweep

    output.quiet_transformers()
    effort, calibration = given["effort"], given["calibration"]
    options = CompressOptions(
        codec=given["codec"],
        settings={"effort": effort} if effort else {},
        calibration=None if calibration == "none" else Calibration(calibration),
        jobs=given["jobs"],
        trust_remote_code=given["trust_remote_code"],
    )
    folder = folder or Path(f"{Path(model.rstrip('/')).stem}-sweep")
    with trusting_remote_code(given["trust_remote_code"]), output.stages() as progress:
        found = sweep(
            model, folder, bits, texts, options, context=given["context"], tokens=given["tokens"], progress=progress
        )
    if as_json:
        output.show_json([evaluation.to_json() for evaluation in found])
        return
    for evaluation in found:
        show(evaluation)
    try:
        plot(found, folder / "sweep.png")
    except ModelError as error:  # the table stands
        output.note(f"no plot: {error}")
    else:
        output.note(f"plot: {folder / 'sweep.png'}")
