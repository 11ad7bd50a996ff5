"""The command `seedpack unpack`."""

from __future__ import annotations

from pathlib import Path

import click

from seedpack.cli import output
from seedpack.cli.checks import check_packed


@click.command("unpack")
@click.argument("packed", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "out",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write; for a Hugging Face folder, the folder.",
)
@click.option("--dtype", help="Dtype of float tensors; default: each tensor's own.")
@output.fraction_option
@output.key_option
@output.max_bytes_option
@click.option("--force", is_flag=True, help="Replace an existing output.")
def command(
    packed: Path, out: Path, dtype: str | None, fraction: float | None, max_bytes: int | None, force: bool
) -> None:
    """Rebuild the dense model of PACKED: a safetensors file, or a Hugging Face folder that needs no seedpack."""
    check_packed(packed, fraction)
    from seedpack import api

    api.unpack(packed, out, dtype=dtype, fraction=fraction, max_bytes=max_bytes, force=force)
    files = sorted(out.glob("*.safetensors")) if out.is_dir() else [out]
    output.echo(f"{out}: {output.size(sum(file.stat().st_size for file in files))} of dense weights")
