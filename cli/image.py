"""The command `seedpack image`."""

from __future__ import annotations

from pathlib import Path

import click

from seedpack.cli import output


@click.group("image")
def command() -> None:
    """Compress an image into the coefficients of a neural field, and render it."""


@command.command("compress")
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="File to write, such as photo.spi."
)
@click.option("--bytes", "size", help="Largest size of the file, such as 20000 or 20KB.")
@click.option("--psnr", type=float, help="Quality to reach in dB, instead of a size: 25 is rough, 30 fair, 35 good.")
@click.option("--steps", type=click.IntRange(1), help="Training steps; more are slower and better. Default: 200.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the network's bases.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compress(
    image: Path,
    out: Path,
    size: str | None,
    psnr: float | None,
    steps: int | None,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Fit a neural field to IMAGE, grey or RGB, and write it."""
    if size is None and psnr is None:
        raise click.UsageError("give a size (--bytes 20KB) or a quality (--psnr 30)")
    if size is not None and psnr is not None:
        raise click.UsageError("--bytes and --psnr are both given; leave one of them out")
    from seedpack import image as images

    steps = steps or images.STEPS
    with output.stages() as stage:
        report = images.compress(
            image,
            out,
            size=None if size is None else output.parse_size(size),
            psnr=psnr,
            steps=steps,
            seed=seed,
            force=force,
            watch=lambda done: stage("Training", done, steps, "steps"),
        )
    if as_json:
        output.show_json(report.to_json())
        return
    output.show_pairs(
        f"Packed {report.path}",
        [
            ("size", f"{output.size(image.stat().st_size)} → {report.file_bytes:,} bytes"),
            ("bits per pixel", f"{report.bits_per_pixel:.3f}"),
            ("PSNR", f"{report.psnr:.2f} dB"),
            ("time", output.duration(report.seconds)),
        ],
    )


@command.command("decompress")
@click.argument("packed", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Image to write, such as photo.png."
)
@output.fraction_option
@output.max_bytes_option
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def decompress(
    packed: Path, out: Path, fraction: float | None, max_bytes: int | None, force: bool, as_json: bool
) -> None:
    """Render the image of PACKED."""
    from seedpack import image as images

    images.format_of(out)
    pixels = images.decompress(packed, fraction=fraction, max_bytes=max_bytes)
    images.write(pixels, out, force=force)
    height, width, channels = pixels.shape
    report = {"path": str(out), "height": height, "width": width, "channels": channels}
    if as_json:
        output.show_json(report)
        return
    output.show_pairs(f"Wrote {out}", [("image", f"{width} × {height}, {'grey' if channels == 1 else 'RGB'}")])
