"""seedpack compress."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click

from seedpack.cli import output


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE pairs; values are JSON where they can be read so, else strings."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--set")
        try:
            settings[key] = json.loads(value)
        except (ValueError, RecursionError):
            settings[key] = value
    return settings


@click.command("compress")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    help="File to write, or folder for a Hugging Face model.",
)
@click.option(
    "--codec", default="trellis", show_default=True, help="trellis, seedlm, svd, svd+seedlm, raw, or a plug-in's id."
)
@click.option(
    "--bits",
    type=float,
    help="Bits a weight; default 4. trellis: 1 to 8; a fraction is a budget that the plan spreads over the tensors. "
    "seedlm: 3 or 4. svd: any.",
)
@click.option(
    "--target-size", help="Instead of --bits: what the weights' files may take, as 90MB; spread over the tensors."
)
@click.option("--effort", help="trellis: fast, default or best: how long to search.")
@click.option("--head-bits", type=int, help="trellis: of a language model's output head and the embedding tied to it.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A hyperparameter of the codec, as rank=64. Repeatable.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Pack only tensors whose name matches, as '*mlp*'. Repeatable.",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave matching tensors raw. Repeatable.")
@click.option(
    "--dtype",
    help="Of raw float tensors and decoded weights: float32, float16, bfloat16. Default: the model's.",
)
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    help="Plan file whose choices win; --dry-run --json writes one.",
)
@click.option(
    "--calibration",
    default="none",
    show_default=True,
    metavar="TEXT",
    help="Fit what layers compute: 'self' (a language model writes the text itself), a text or JSON lines file, or a hub "
    "data set.",
)
@click.option("--calibration-tokens", type=int, default=16384, show_default=True, help="How many tokens of it.")
@click.option("--calibration-seed", type=int, default=0, show_default=True, help="Of what the model writes.")
@click.option("--sequential", is_flag=True, help="Calibrate each layer on what the packed layers before it give.")
@click.option(
    "--tune",
    is_flag=True,
    help="Then tune scales, norms and biases, so that the packed model predicts what the original does.",
)
@click.option(
    "--key-file",
    type=click.Path(),
    help="basis and mask: a private key (16 bytes or 32 hexadecimal digits) for the seed.",
)
@click.option("--device", default="cpu", show_default=True, help="Where to fit: cpu, cuda, or cuda:N.")
@click.option("--shard-size", help="Split a folder's weights into files of at most this, as 5GB.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; with --calibration, after measuring.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--allow-nonfinite", is_flag=True, help="Store tensors with NaN or Inf raw instead of refusing them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    out: Path | None,
    codec: str,
    bits: float | None,
    effort: str | None,
    head_bits: int | None,
    target_size: str | None,
    settings: tuple[str, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    dtype: str | None,
    plan: Path | None,
    calibration: str,
    calibration_tokens: int,
    calibration_seed: int,
    sequential: bool,
    tune: bool,
    key_file: str | None,
    device: str,
    shard_size: str | None,
    dry_run: bool,
    force: bool,
    allow_nonfinite: bool,
    as_json: bool,
) -> None:
    """Pack MODEL into a seed + coefficient checkpoint.

    MODEL is a state dict (.pt, .pth, .th, .bin), a .safetensors or .gguf file, a Hugging Face folder, or a hub id.
    """
    if out is None and not dry_run:
        raise click.UsageError("name an output with -o, or look at the plan with --dry-run")
    if out is None and calibration != "none":
        raise click.UsageError("name the output with -o: the calibration is kept beside it, for the run that follows")
    if calibration == "none" and (tune or sequential):
        raise click.UsageError("--tune and --sequential work on a calibration text: add --calibration self")
    from seedpack import api
    from seedpack.converter.calibration.calibrate import Calibration
    from seedpack.converter.sources.open import open_source
    from seedpack.keys import add_key, default_seed, read_key

    output.quiet_transformers()
    chosen_settings = parse_settings(settings) | ({"effort": effort} if effort else {})
    if key_file is not None:
        key = read_key(key_file)
        chosen_settings = {"seed": default_seed(None, key), **chosen_settings, "key": add_key(key)}
    choice: dict[str, Any] = {
        "codec": codec, "bits": bits, "settings": chosen_settings,
        "include": include, "exclude": exclude, "dtype": dtype, "plan": plan, "head_bits": head_bits,
        "target_size": None if target_size is None else output.parse_size(target_size),
    }  # fmt: skip
    source = open_source(model)
    chosen = api.plan_for(source, **choice)
    if source.dropped and not as_json:
        click.echo(f"note: left out, as no weights: {', '.join(source.dropped[:6])}", err=True)
    text = None
    if calibration != "none":
        text = Calibration(
            calibration, calibration_tokens, seed=calibration_seed, sequential=sequential, tune=int(tune)
        )
    if dry_run and text is not None:
        with output.stages() as stage:
            chosen = api.calibrated_plan_for(
                source,
                str(out),
                text,
                **choice,
                allow_nonfinite=allow_nonfinite,
                device=device,
                watch_calibration=stage,
            )
    if dry_run:
        output.show_json(chosen.to_json()) if as_json else show_plan(model, chosen)
        return
    assert out is not None
    with output.stages() as stage:
        report = api.compress(
            source, out, **choice, force=force, allow_nonfinite=allow_nonfinite, device=device, calibration=text,
            shard_bytes=None if shard_size is None else output.parse_size(shard_size),
            watch=lambda name, count: stage("Fitting", count, chosen.packed_weights, "weights", name),
            watch_calibration=stage,
        )  # fmt: skip
    output.show_json(report.to_json()) if as_json else show_report(report)


def codec_label(codec: Any) -> str:
    """A codec's id, with its code bits where tensors may differ in them."""
    return f"{codec.id} {codec.code_bits}" if hasattr(codec, "code_bits") else str(codec.id)


def show_plan(model: str, plan: Any) -> None:
    """The plan as a table: per tensor codec, bits, bytes before and after."""
    rows = [
        (t.name, "×".join(map(str, t.shape)), codec_label(t.codec) if t.packed else "raw", f"{t.bits_per_weight:.3f}",
         output.size(t.source_bytes), output.size(t.stored_bytes))
        for t in plan.tensors
    ]  # fmt: skip
    totals = plan.totals()
    output.show_table(
        f"Plan for {model}",
        ("tensor", "shape", "codec", "bits", "before", "after"),
        rows,
        ("total", "", "", f"{totals['bits_per_weight']:.3f}", output.size(totals["source_bytes"]),
         output.size(totals["stored_bytes"])),
    )  # fmt: skip
    notes = Counter(t.note for t in plan.tensors if t.note)
    lines = [
        f"{totals['packed_tensors']} of {totals['tensors']} tensors packed, "
        f"{totals['bits_per_packed_weight']:.3f} bits for each of their weights",
        *(f"{n} tensors raw: {note}" for note, n in notes.items()),
    ]
    click.echo("\n".join(lines))


def show_report(report: Any) -> None:
    """The summary after packing."""
    totals = report.plan.totals()
    worst = max(report.tensors, key=lambda t: t.error_db, default=None)
    fitting = sum(t.seconds for t in report.tensors)
    pairs = [
        ("size", f"{output.size(totals['source_bytes'])} → {output.size(report.file_bytes)} on disk "
                 f"({totals['source_bytes'] / max(1, report.file_bytes):.2f}× smaller)"),
        ("tensors", f"{totals['packed_tensors']} packed, {totals['tensors'] - totals['packed_tensors']} raw"),
        ("bits a weight", (f"{totals['bits_per_packed_weight']:.4f} over packed, " if report.tensors else "")
                          + f"{totals['bits_per_weight']:.4f} over all"),
    ]  # fmt: skip
    if worst is not None:
        rate = totals["packed_weights"] / max(1e-9, fitting)
        pairs += [
            ("relative error", f"{output.db(report.error_db)} overall, worst {output.db(worst.error_db)} ({worst.plan.name})"),
            ("time", f"{output.duration(report.seconds)}, {rate:,.0f} weights/s while fitting"),
        ]  # fmt: skip
    output.show_pairs(f"Packed {report.path}", pairs)
