"""The command `seedpack eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from seedpack.cli import output
from seedpack.hf.tasks import IMAGE_CLASSES, TASKS

if TYPE_CHECKING:
    from seedpack.eval.evaluate import Evaluation, Report, Size


@click.command("eval")
@click.argument("original")
@click.argument("packed", nargs=-1, required=True)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text file, may be given again; for all but language models, each line is an input, or an input, a tab, and its label or target.",
)
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of images, for image classifiers; sub-folders may be named by labels.",
)
@click.option(
    "--task", type=click.Choice(list(TASKS)), help="What the models are for. Default: told from the configuration."
)
@click.option(
    "--context",
    default=1024,
    show_default=True,
    type=click.IntRange(2),
    help="Tokens per window or line, at most as many as the model takes.",
)
@click.option("--tokens", default=16384, show_default=True, type=click.IntRange(2), help="Tokens of the text to use.")
@click.option("--card", is_flag=True, help="Write what is measured into the model cards of the packed folders.")
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    metavar="ORG/NAME[:TASK]",
    help="With --card: the hub's data set that the text is of, one for each text; for the results that the hub lists.",
)
@output.key_option
@output.trust_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    original: str,
    packed: tuple[str, ...],
    texts: tuple[Path, ...],
    images: Path | None,
    task: str | None,
    context: int,
    tokens: int,
    card: bool,
    datasets: tuple[str, ...],
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Score the models PACKED beside ORIGINAL, by what they are for.

    Language models: perplexity, KL divergence, top-1 agreement, with 95% confidence intervals. Sequence-to-sequence models: the same, of targets. Encoders:
    cosine distance of embeddings, nearest neighbours. Classifiers: agreement, KL divergence, accuracy.

    ORIGINAL may be a Hugging Face folder, a hub id, or the GGUF file of a language model.
    """
    from seedpack.converter.trust import trusting_remote_code
    from seedpack.eval.evaluate import evaluate_each
    from seedpack.hf.eval_results import parse_datasets, write_eval_results
    from seedpack.hf.tasks import task_of

    if datasets and not card:
        raise click.UsageError("--dataset says what the results in a card are of: add --card")
    output.quiet_transformers()
    folders = [] if images is None else [images]
    with trusting_remote_code(trust_remote_code):
        task = task or task_of(original)
        data, others = (folders, texts) if task == IMAGE_CLASSES else (texts, folders)
        if not data or others:
            option, what = ("--images", "a folder") if task == IMAGE_CLASSES else ("--text", "a file")
            raise click.UsageError(
                f"{original}: {task} is measured on {what}: give {option} {what.upper()[2:]}, and no other data"
            )
        if datasets:
            parse_datasets(datasets, len(data))
        with output.stages() as advance:
            found = evaluate_each(original, packed, data, task=task, context=context, tokens=tokens, progress=advance)
    if card:
        from seedpack.hf.card import write_card

        for path in packed:
            write_card(path, found, base_model=None if Path(original).exists() else original)
            output.note(f"card: {Path(path) / 'README.md'}")
            for file in write_eval_results(path, found, datasets) if datasets else ():
                output.note(f"results: {file}")
    if as_json:
        documents = [evaluation.to_json() for evaluation in found]
        output.show_json(documents if len(documents) > 1 else documents[0])
    else:
        for evaluation in found:
            show(evaluation)


def show(evaluation: Evaluation) -> None:
    """Print a row for the original, and one for each packed model."""
    cells = [_cells(report) for _, report in evaluation.packed]
    columns = ["model", "on disk", "bits per weight", *cells[0]]
    rows = [[*_size(evaluation.original), *(of_original for of_original, _ in cells[0].values())]]
    for (size, _), measures in zip(evaluation.packed, cells, strict=True):
        rows.append([*_size(size), *(of_packed for _, of_packed in measures.values())])
    output.show_table(f"{evaluation.task} on {evaluation.data}: {evaluation.inputs}", columns, rows)


def _size(size: Size) -> list[str]:
    disk = "" if size.file_bytes is None else output.size(size.file_bytes)
    return [size.path, disk, "" if size.bits_per_weight is None else f"{size.bits_per_weight:.3f}"]


def _cells(report: Report) -> dict[str, tuple[str, str]]:
    """Return each measure's name and how it is printed, of the original and of the packed model."""
    from seedpack.eval.classes import ClassReport
    from seedpack.eval.embeddings import EmbeddingReport

    if isinstance(report, EmbeddingReport):
        return {
            "1 - cosine, mean": ("", f"{report.distance_mean:.5f}"),
            "largest": ("", f"{report.distance_max:.5f}"),
            "same nearest": ("", _percent(report.nearest_agreement)),
            f"same {report.neighbours} nearest": ("", _percent(report.neighbours_overlap)),
        }
    divergence = {"KL, nats": ("", f"{report.kl_mean:.4f}"), "KL, 99%": ("", f"{report.kl_p99:.4f}")}
    if isinstance(report, ClassReport):
        cells = {"same class": ("", _percent(report.agreement)), **divergence}
        if report.accuracy_original is not None and report.accuracy_packed is not None:
            cells["accuracy"] = (_percent(report.accuracy_original), _percent(report.accuracy_packed))
        return cells
    perplexity = f"{report.perplexity_packed:.3f}{_half(report.perplexity_interval, '.3f')}"
    return {
        "perplexity": (f"{report.perplexity_original:.3f}", perplexity),
        "KL, nats": ("", f"{report.kl_mean:.4f}{_half(report.kl_interval, '.4f')}"),
        "KL, 99%": ("", f"{report.kl_p99:.3f}"),
        "KL, 99.9%": ("", f"{report.kl_p999:.3f}"),
        "top-1 agreement": ("", f"{_percent(report.top1_agreement)}{_half(report.top1_interval, '.2f', 100)}"),
    }


def _half(interval: tuple[float, float] | None, form: str, unit: float = 1) -> str:
    """Return half of a confidence interval, as it stands behind a mean."""
    return "" if interval is None else f" ± {format(unit * (interval[1] - interval[0]) / 2, form)}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
