"""seedpack compress."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seedpack.cli import output as screen
from seedpack.cli.checks import check_compress, check_output
from seedpack.cli.shards import keep_command
from seedpack.formats.places import is_remote, place

MUCH_RAW = 0.2  # of the weights: who packs a model expects less
MUCH_USED = 0.9  # of a size that was allowed
WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # of text
LONG = 4_000_000  # weights: fewer are fitted before one has read an estimate
FEW_BITS = 3.6  # per weight: below, calibration pays

if TYPE_CHECKING:
    from seedpack.converter.options import CompressOptions


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Parse KEY=VALUE pairs; values are JSON where they can be read so, else strings."""
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
    type=click.Path(),
    help="File to write, or folder for a Hugging Face model. Default: the model's name with codec and bits, here.",
)
@click.option(
    "--codec",
    default="trellis",
    show_default=True,
    help="trellis, seedlm, svd, svd+trellis, basis, mask, raw, or a plug-in's id.",
)
@click.option(
    "--bits",
    type=float,
    help="Bits per weight; default 4. trellis: 1 to 8; a fraction is a budget that the plan spreads over the tensors. "
    "seedlm: 3 or 4. svd: any.",
)
@click.option(
    "--target-size", help="Instead of --bits: what the weights' files may take, as 90MB; spread over the tensors."
)
@click.option("--effort", help="trellis: fast, default or best: how long to search.")
@click.option(
    "--head-bits", type=float, help="trellis: of a language model's output head and the embedding tied to it."
)
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
@click.option("--dtype", help="Of raw floats and decoded weights: float32, float16, bfloat16; default the model's.")
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    help="Plan file whose choices win; --dry-run --json writes one.",
)
@click.option(
    "--calibration",
    default="auto",
    show_default=True,
    metavar="TEXT",
    help="Fit the layers' outputs instead of their weights: 'self' (a language model writes the text itself), a text or JSON lines "
    "file, a hub data set, 'self+' and one of these; 'none' does not; 'auto' is self for language models that fit the memory.",
)
@click.option("--calibration-tokens", type=int, default=16384, show_default=True, help="How many tokens of it.")
@click.option("--calibration-context", type=int, default=0, help="Tokens per sequence of it [512; 128 of its own].")
@click.option("--calibration-seed", type=int, default=0, show_default=True, help="Of the text that the model writes.")
@click.option(
    "--sequential/--no-sequential", default=None, help="Layers make up for those before [where one process fits]."
)
@click.option("--tune", is_flag=True, help="Then tune scales, norms and biases to what the original predicts.")
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="A budget (--bits 3.5, --target-size) with a calibration: pack once, measure what each tensor costs the model, and "
    "spread the bits by that.",
)
@click.option(
    "--key-file",
    type=click.Path(),
    help="basis and mask: a private key (16 bytes or 32 hexadecimal digits) for the seed.",
)
@click.option("--device", default="cpu", show_default=True, help="Where to fit: cpu, cuda, or cuda:N.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that fit: with a share of the cores, or a GPU.",
)
@click.option(
    "--shard",
    metavar="I/N",
    help="Fit only the I-th of N shares of the tensors, for seedpack merge; env takes RANK and WORLD_SIZE.",
)
@click.option(
    "--engine",
    type=click.Choice(["processes", "ray"]),
    default="processes",
    show_default=True,
    help="What fits: processes here, or the workers of a Ray cluster.",
)
@click.option("--address", help="Of the Ray cluster; default the one that this machine belongs to.")
@click.option("--shard-size", help="Split a folder's weights into files of at most this, as 5GB.")
@click.option(
    "--push-to-hub",
    "repo",
    metavar="REPO",
    help="Upload the packed folder there, with a model card; see seedpack push.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; a --calibration asked for by name runs first.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option(
    "--state-key", help="Of a .pt file: the key, or keys with dots between them, that the state dict is under."
)
@screen.trust_option
@click.option("--allow-nonfinite", is_flag=True, help="Store tensors with NaN or Inf raw instead of refusing them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str, output: str | None, dry_run: bool, as_json: bool, shard: str | None, repo: str | None, **given: Any
) -> None:
    """Pack MODEL into a seed + coefficient checkpoint.

    MODEL is a state dict (.pt, .pth, .th, .bin, .ckpt), a .safetensors or .gguf file, a Hugging Face folder, a hub id, or an address
    (s3://, gs://, hf://, https://).
    """
    if given["tune"] or given["sequential"]:
        if given["calibration"] == "none":
            raise click.UsageError("--tune and --sequential work on a calibration text: add --calibration self")
        if given["calibration"] == "auto":
            given["calibration"] = "self"
    if repo is not None and (dry_run or shard is not None):
        raise click.UsageError(
            "--push-to-hub uploads what is packed: leave --dry-run and --shard out, or push it afterwards"
        )
    check_compress(model, None if dry_run else output, **given)
    asked = dict(given)
    with screen.stages() as progress:
        progress("Starting", 0, 0)
        from seedpack import api
        from seedpack.converter.estimate import estimate
        from seedpack.converter.pipeline import fit_shard
        from seedpack.converter.planning import make_plan
        from seedpack.converter.shards import Shard
        from seedpack.converter.sources.open import open_source
        from seedpack.converter.trust import trusting_remote_code
        from seedpack.converter.usual import with_usual_calibration

        screen.quiet_transformers()
        edits, options = given.pop("plan"), options_of(**given)
        progress("Reading the model", 0, 0)
        with trusting_remote_code(options.trust_remote_code):
            source = open_source(model, state_key=options.state_key)
        path = output_path(model, output, options, is_folder=source.config is not None)
        if repo is not None:
            prepare_upload(repo, is_folder=source.config is not None)
        if not as_json:
            notes = [] if output == str(path) or dry_run else [f"output: {path}"]
            for note in source_notes(source) + notes:
                screen.note(note)
        if dry_run:
            plan = api.plan(source, options, output=path, edits=edits, progress=progress)
            progress("Estimating", 0, 0)
            estimated = None if as_json else estimate(source, plan, with_usual_calibration(source, options))
        elif shard is not None:
            chosen = Shard.parse(shard)
            keep_command(path, model, source.state, asked)
            fitted = fit_shard(source, path, options, shard=chosen, plan=edits, progress=progress)
        else:
            check_output(path, options.force, is_folder=source.config is not None)
            options = decided(source, options)
            shows = not as_json and not screen.chose("quiet")
            if shows and (planned := make_plan(source, options, edits)).packed_weights > LONG:
                progress("Estimating", 0, 0)
                screen.note(f"estimate: {estimate(source, planned, options)}")
            report = api.compress(source, path, options, plan=edits, progress=progress)
    if dry_run:
        screen.show_json(plan.to_json()) if as_json else show_plan(model, plan, estimated)
    elif shard is not None:
        if as_json:
            screen.show_json({"shard": str(chosen), "tensors": {t.plan.name: t.error_db for t in fitted}})
        else:
            screen.echo(f"shard {chosen}: {screen.count(len(fitted), 'tensor')} fitted; once all {chosen.count} are:")
            screen.echo(f"next: seedpack merge {shlex.quote(str(path))}")
    else:
        screen.show_json(report.to_json()) if as_json else show_report(report, options)
        if repo is not None:
            upload(report, repo, model)


def decided(source: Any, options: CompressOptions) -> CompressOptions:
    """Return options with the calibration decided, and say what it is and how long it takes."""
    from seedpack.converter.usual import time_of, with_usual_calibration

    options = with_usual_calibration(source, options)
    calibration = options.calibrated
    if calibration is not None and calibration.is_usual and not screen.chose("quiet"):
        screen.note(
            f"calibration: the model first writes {calibration.tokens:,} tokens, and is fitted to what its layers compute on "
            f"them: about {time_of(source, options)}; --calibration none leaves it out"
        )
    return options


def prepare_upload(repo: str, *, is_folder: bool) -> None:
    """Make the repository, before hours are spent."""
    from seedpack.hf.push import make_repository

    if not is_folder:
        raise click.UsageError("--push-to-hub uploads a folder, and this model is packed into a file; leave it out")
    make_repository(repo)


def upload(report: Any, repo: str, model: str) -> None:
    """Write the card of what was packed, and upload it."""
    from seedpack.hf.card import write_card
    from seedpack.hf.push import push

    command = shlex.join(["seedpack", *sys.argv[1:]])
    write_card(report.path, base_model=None if Path(model).exists() else model, command=command)
    screen.note(f"uploaded: {push(report.path, repo)}")


def options_of(
    *, settings: tuple[str, ...], effort: str | None, calibration: str, key_file: str | None, **given: Any
) -> CompressOptions:
    """Build the library's options of those of the command line."""
    from seedpack.converter.options import Calibration, CompressOptions
    from seedpack.keys import read_key

    tokens, context, seed = (given.pop(f"calibration_{name}") for name in ("tokens", "context", "seed"))
    sequential, tune, measure = given.pop("sequential"), given.pop("tune"), given.pop("measure")
    target_size, shard_size = given.pop("target_size"), given.pop("shard_size")
    text = None
    if calibration != "none":
        text = Calibration(calibration, tokens, context, seed, sequential=sequential, tune=int(tune), measure=measure)
    return CompressOptions(
        settings=parse_settings(settings) | ({"effort": effort} if effort else {}),
        target_size=None if target_size is None else screen.parse_size(target_size),
        shard_bytes=None if shard_size is None else screen.parse_size(shard_size),
        calibration=text,
        key=None if key_file is None else read_key(key_file),
        **given,
    )


def output_path(model: str, output: str | None, options: CompressOptions, *, is_folder: bool) -> Path:
    """Return where to write: the path that was given, or a name by model, codec and bits, in a folder that was given or here."""
    into_folder = output is not None and not is_folder and goes_into(output)
    if output is not None and not into_folder:
        return place(output)
    codec = options.codec if isinstance(options.codec, str) else options.codec.id
    chosen = {key: value for key, value in (options.settings or {}).items() if key not in ("effort", "seed", "key")}
    if options.target_size is not None:
        rate = [screen.size(options.target_size).replace(" ", "")]
    elif options.bits is None and (chosen or codec == "raw"):  # which say the rate
        rate = [f"{key}{value}" for key, value in chosen.items()]
    else:
        rate = [f"{4 if options.bits is None else options.bits:g}bit"]
    name = Path(model.rstrip("/"))
    stem = name.stem if is_remote(model) or name.is_file() else name.resolve().name
    labels = [
        stem,
        codec.replace("+", "-"),
        *rate,
        *(["calibrated"] if options.calibrated else []),
    ]
    return Path(output or "") / ("-".join(labels) + ("" if is_folder else ".safetensors"))


def goes_into(output: str) -> bool:
    """Return whether an output is a folder to put a file in: no model lies there, which it would become a part of."""
    folder = Path(output)
    if is_remote(output):
        return False
    return output.endswith(os.sep) or (folder.is_dir() and not (folder / "config.json").exists())


def source_notes(source: Any) -> list[str]:
    """Return lines on what was done to a model's tensors, and on what was left out."""
    names, count = ", ".join(source.dropped[:6]), len(source.dropped)
    more = f" and {count - 6} more" if count > 6 else ""
    left_out = [f"note: ignored, as no weights: {names}{more}"] if names else []
    return [f"source: {note}" for note in source.notes] + left_out


def codec_label(codec: Any) -> str:
    """Return a codec's id, with its code bits where tensors may differ in them."""
    if hasattr(codec, "inner"):
        return f"{codec_label(codec.inner)}, stacked"
    return f"{codec.id} {codec.code_bits}" if hasattr(codec, "code_bits") else str(codec.id)


def show_plan(model: str, plan: Any, estimated: Any) -> None:
    """Print the plan as a table: per tensor codec, bits, bytes before and after."""

    def row(tensor: Any) -> tuple[str, ...]:
        shape, codec = "×".join(map(str, tensor.shape)), codec_label(tensor.codec) if tensor.packed else "raw"
        before, after = screen.size(tensor.source_bytes), screen.size(tensor.stored_bytes)
        return tensor.name, shape, codec, f"{tensor.bits_per_weight:.3f}", before, after

    totals = plan.totals()
    before, after = screen.size(totals["source_bytes"]), screen.size(totals["stored_bytes"])
    screen.show_table(
        f"Plan for {model}",
        ("tensor", "shape", "codec", "bits", "before", "after"),
        [row(tensor) for tensor in plan.tensors],
        ("total", "", "", f"{totals['bits_per_weight']:.3f}", before, after),
    )
    notes = Counter(t.note for t in plan.tensors if not t.packed)
    lines = [
        f"{totals['packed_tensors']} of {screen.count(totals['tensors'], 'tensor')} packed, at "
        f"{totals['bits_per_packed_weight']:.3f} bits per weight",
        *(f"{screen.count(n, 'tensor')} raw: {note}" for note, n in notes.items()),
    ]
    for line in [*lines, f"estimate: {estimated}"]:
        screen.echo(line)


def show_report(report: Any, options: CompressOptions) -> None:
    """Print the summary after packing, and the commands that one goes on with."""
    lines = report.summary()
    screen.show_pairs(f"Packed {report.source} as {report.path}", list(lines.items()))
    target_size = options.target_size
    if target_size is not None and report.file_bytes < MUCH_USED * target_size:
        screen.note(
            f"note: of the {screen.size(target_size)} that were allowed, {screen.size(report.file_bytes)} are used: "
            + (
                "all tensors have the most bits"
                if report.plan.has_most_bits()
                else "more bits for any tensor would exceed it"
            )
        )
    raw = sum(report.plan.raw_shares().values())
    if report.tensors and raw > MUCH_RAW:
        screen.note(
            f"warning: {raw:.0%} of the weights stay as they were, so the file is that much larger than it could be; "
            "--dry-run lists each tensor with the reason"
        )
    for line in next_steps(report, options):
        screen.echo(line)


def next_steps(report: Any, options: CompressOptions) -> list[str]:
    """Return lines that say how to go on."""
    packed, original = shlex.quote(str(report.path)), shlex.quote(report.source)
    if not report.path.is_dir():
        key = f" --state-key {shlex.quote(options.state_key)}" if options.state_key else ""
        return [
            f"next: seedpack verify {packed}",
            f"      seedpack compare {original} {packed}{key}",
            f"in Python: net = seedpack.load({str(report.path)!r}, model=net)",
        ]
    steps = [f"seedpack eval {original} {packed} --text FILE"]
    if any(name.endswith(WRITERS) for name in architectures(report.path)):
        steps.insert(0, f'seedpack run {packed} "Once upon a time"')
        if options.calibrated is None and report.plan.totals()["bits_per_packed_weight"] < FEW_BITS:
            steps.append("(at so few bits, --calibration self about halves what is lost)")
    steps = [f"{'      ' if i else 'next: '}{step}" for i, step in enumerate(steps)]
    return [*steps, f"in Python: model = seedpack.load({str(report.path)!r})"]


def architectures(folder: Path) -> list[str]:
    """Return the names of a packed folder's classes."""
    return list(json.loads((folder / "config.json").read_text()).get("architectures") or ())
