"""Results on data sets of the hub, as files that the hub reads: `.eval_results/` of a repository."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from seedpack._version import WRITER
from seedpack.converter.journal import write_file
from seedpack.errors import ModelError
from seedpack.formats.record import write_record
from seedpack.hf.card import measured_of, require_recorded

FOLDER = ".eval_results"
DATASET = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
VALUES = (  # the measure that is a model's score, and how it is called
    ("perplexity_packed", "perplexity_interval", "perplexity"),
    ("accuracy_packed", "", "accuracy"),
    ("agreement", "", "share of the same classes as the original"),
    ("nearest_agreement", "", "share of the same nearest neighbours as the original"),
)


def write_eval_results(folder: str | Path, evaluations: Sequence[Any], datasets: Sequence[str]) -> list[Path]:
    """Write a file for each evaluation, anew in the record of the folder's files, and return the files.

    Args:
        folder: as `compress` writes it.
        evaluations: of `seedpack.eval`, in which this folder is one of the packed models.
        datasets: for each the hub id of the data set that its text is of, with its task as the hub calls it: "org/name:task",
            or "org/name" for the task "default".

    Raises:
        ModelError: there are not as many data sets as evaluations, or one is no such id.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    path, named = Path(folder), parse_datasets(datasets, len(evaluations))
    require_recorded(path)
    written = []
    for evaluation, (dataset, task) in zip(evaluations, named, strict=True):
        for _, _, report in measured_of(path, [evaluation]):
            found: dict[str, Any] = asdict(report)
            measure, interval, label = next(value for value in VALUES if found.get(value[0]) is not None)
            notes = [label, evaluation.inputs]
            if found.get(interval) is not None:
                notes.append("95% {:.5g} to {:.5g}".format(*found[interval]))
            if found.get("kl_mean") is not None:
                notes.append(f"KL divergence from the original {found['kl_mean']:.5g}")
            entry = EvalResultEntry(
                dataset_id=dataset,
                task_id=task,
                value=found[measure],
                date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                notes=f"{'; '.join(notes)} (measured by {WRITER})",
            )
            file = path / FOLDER / f"{dataset.replace('/', '--')}--{task}.yaml"
            file.parent.mkdir(exist_ok=True)
            _write(file, eval_result_entries_to_yaml([entry]))
            written.append(file)
    write_record(path)
    return written


def parse_datasets(datasets: Sequence[str], texts: int) -> list[tuple[str, str]]:
    """Return ids and tasks of the hub's data sets, one for each text."""
    matches = [DATASET.fullmatch(dataset) for dataset in datasets]
    for dataset, match in zip(datasets, matches, strict=True):
        if match is None:
            raise ModelError(f"{dataset!r}: expected a data set of the hub as org/name or org/name:task")
    if len(datasets) != texts:
        raise ModelError(f"{len(datasets)} data sets for {texts} texts: name one for each, in their order")
    return [(match[1], match[2] or "default") for match in matches if match]


def _write(file: Path, entries: Any) -> None:
    import yaml

    write_file(file, lambda partial: partial.write_text(yaml.safe_dump(entries, sort_keys=False), "utf-8"))
