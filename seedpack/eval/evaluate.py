"""Compare packed models with their original, by the measures of what the model is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from seedpack.converter.options import Progress, silent
from seedpack.errors import ModelError
from seedpack.eval.classes import ClassReport, class_of, compare_classifiers
from seedpack.eval.embeddings import EmbeddingReport, compare_embeddings
from seedpack.eval.inputs import encode_lines, find_images, image_batches, read_lines, some_labels, text_batches
from seedpack.eval.language import LanguageReport, compare_language_models, windows
from seedpack.eval.models import Advance
from seedpack.eval.sequences import SequenceReport, compare_sequence_models, write_targets
from seedpack.hf.tasks import (
    EMBEDDINGS,
    IMAGE_CLASSES,
    LANGUAGE,
    SEQ2SEQ,
    TEXT_CLASSES,
    load_for_task,
    load_processor,
    pooling_of,
    task_of,
)

Report = LanguageReport | SequenceReport | EmbeddingReport | ClassReport


@dataclass(frozen=True)
class Size:
    """A model's size on disk.

    Attributes:
        path: the model's.
        file_bytes: of its weight files, headers included; None of a hub model.
        bits_per_weight: 8 · file_bytes by the weights of the original; None where either is not known.
    """

    path: str
    file_bytes: int | None
    bits_per_weight: float | None


@dataclass(frozen=True)
class Evaluation:
    """Packed models beside their original.

    Attributes:
        task: one of `seedpack.hf.tasks.TASKS`.
        data: the text or the folder of images.
        inputs: says in words what of it was used.
        original: its size.
        packed: a size and a report for each packed model.
    """

    task: str
    data: str
    inputs: str
    original: Size
    packed: tuple[tuple[Size, Report], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, with one list of variants."""
        variants = [{**vars(size), **report.to_json()} for size, report in self.packed]
        about = {"task": self.task, "data": self.data, "inputs": self.inputs}
        return {**about, "original": vars(self.original), "variants": variants}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Evaluation:
        """Return the evaluation of which this is the JSON object."""
        sizes, report = [field.name for field in fields(Size)], _REPORTS[document["task"]]

        def variant(found: dict[str, Any]) -> tuple[Size, Report]:
            measures: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
            return Size(**{name: measures.pop(name) for name in sizes}), report(**measures)

        about = {name: document[name] for name in ("task", "data", "inputs")}
        return cls(**about, original=Size(**document["original"]), packed=tuple(map(variant, document["variants"])))


@dataclass(frozen=True)
class _Run:
    """The models, original first, with all that the methods need."""

    models: Sequence[Any]
    original: str | Path
    processor: Any
    data: Path
    context: int
    tokens: int
    progress: Progress

    def limit(self) -> int:
        """Return how many tokens a window or a line may have; some models say -1 where there is no limit."""
        limit = getattr(self.models[0].config, "max_position_embeddings", None) or self.context
        return min(self.context, limit) if limit > 0 else self.context

    def advance(self, stage: str, total: int, unit: str) -> Advance:
        """Return a function of the units done since the last call."""
        return lambda count: self.progress(stage, count, total, unit)

    def encoded(self, texts: Sequence[str]) -> tuple[list[Any], str]:
        """Return encoded texts, and a description."""
        limit = min(self.limit(), self.processor.model_max_length)
        encoded = encode_lines(self.processor, texts, limit, self.tokens)
        total = sum(len(encoding["input_ids"]) for encoding in encoded)
        return encoded, f"{len(encoded):,} lines, {total:,} tokens"


def evaluate(
    original: str | Path,
    packed: Sequence[str | Path],
    data: str | Path,
    *,
    task: str | None = None,
    context: int = 1024,
    tokens: int = 16384,
    progress: Progress = silent,
) -> Evaluation:
    """Score packed models beside their original, which runs once; all are in memory together, in float32.

    Args:
        original: a Hugging Face folder, a hub id, or the GGUF file of a language model.
        packed: folders as `compress` writes them, or any other variants; one at least.
        data: a text file, or of image classifiers a folder of images. A language model reads the text whole, others a line at
            a time. A line may hold, after a tab, a classifier's label, or a sequence-to-sequence model's target; without
            targets, what the original writes is the target. Sub-folders of images may be named by labels.
        task: one of `seedpack.hf.tasks.TASKS`; told from the original's configuration by default.
        context: tokens per window, or per line, at most; as many as the model takes, if that is less.
        tokens: of the text to use.
        progress: called as work is done.

    Raises:
        ModelError: a model cannot be loaded or run, or the data is too short or not what the task needs.
    """
    return evaluate_each(original, packed, [data], task=task, context=context, tokens=tokens, progress=progress)[0]


def evaluate_each(
    original: str | Path,
    packed: Sequence[str | Path],
    data: Sequence[str | Path],
    *,
    task: str | None = None,
    context: int = 1024,
    tokens: int = 16384,
    progress: Progress = silent,
) -> list[Evaluation]:
    """Score packed models on several texts, or folders of images, one after the other; the models are loaded once.

    Args and errors as for `evaluate`.
    """
    task = task or task_of(original)
    for path in map(Path, data):
        if not path.exists() or path.is_dir() != (task == IMAGE_CLASSES):
            wanted = "a folder of images" if task == IMAGE_CLASSES else "a text file"
            raise ModelError(f"{path}: {task} needs {wanted}")
    models = [load_for_task(path, task) for path in (original, *packed)]
    processor = load_processor(original, task)
    dense = getattr(models[0], "hf_quantizer", None) is None
    weights = models[0].num_parameters() if dense else None
    first, *sizes = (_size(path, weights) for path in (original, *packed))
    found = []
    for path in map(Path, data):
        inputs, reports = compare_loaded(
            models, processor, original, path, task, context=context, tokens=tokens, progress=progress
        )
        found.append(Evaluation(task, str(path), inputs, first, tuple(zip(sizes, reports, strict=True))))
    return found


def compare_loaded(
    models: Sequence[Any],
    processor: Any,
    original: str | Path,
    data: Path,
    task: str,
    *,
    context: int,
    tokens: int,
    progress: Progress = silent,
) -> tuple[str, Sequence[Report]]:
    """Return in words what of the data is used, and a report for each model after the first, which is the original.

    Args:
        models: that are loaded.
        processor: of the original.
        original: where the first was loaded from.
        data: see `evaluate`; so are the others.
        task: of the models.
        context: tokens per window.
        tokens: of the text.
        progress: called as work is done.
    """
    reports, inputs = _METHODS[task](_Run(models, original, processor, data, context, tokens, progress))
    return inputs, reports


def _size(path: str | Path, weights: int | None) -> Size:
    here = Path(path)
    files = [here] if here.is_file() else [*here.glob("*.safetensors")] or [*here.glob("*.bin")]
    size = sum(file.stat().st_size for file in files)
    return Size(str(path), size or None, 8 * size / weights if size and weights else None)


def _language(run: _Run) -> tuple[Sequence[Report], str]:
    original, *packed = run.models
    text = run.data.read_text("utf-8", "replace")
    ids = windows(run.processor, text, min(run.limit(), run.tokens), run.tokens)
    reports = compare_language_models(original, packed, ids, run.advance("Scoring", ids[:, 1:].numel(), "tokens"))
    return reports, f"{reports[0].tokens:,} tokens scored, context {reports[0].context}, windows without overlap"


def _sequences(run: _Run) -> tuple[Sequence[Report], str]:
    original, *packed = run.models
    lines = read_lines(run.data)
    encoded, used = run.encoded([line.text for line in lines])
    sources = [torch.tensor(encoding["input_ids"]) for encoding in encoded]
    if lines[0].answer is None:
        total, whose = sum(map(len, sources)), "the original's own"
        targets = write_targets(original, sources, run.advance("Writing targets", total, "tokens"))
    else:
        answers, whose = [str(line.answer) for line in lines[: len(sources)]], "given"
        encode = partial(run.processor, truncation=True, max_length=run.limit(), return_tensors="pt")
        targets = [encode(text_target=answer)["input_ids"][0] for answer in answers]
    advance = run.advance("Scoring", sum(map(len, targets)), "tokens")
    reports = compare_sequence_models(original, packed, list(zip(sources, targets, strict=True)), advance)
    return reports, f"{used}; {reports[0].tokens:,} tokens of targets scored, {whose}"


def _embeddings(run: _Run) -> tuple[Sequence[Report], str]:
    original, *packed = run.models
    pooling = pooling_of(run.original)
    texts = dict.fromkeys(line.text for line in read_lines(run.data, answers=False))
    encoded, used = run.encoded(list(texts))
    batches = text_batches(run.processor, original, encoded)
    reports = compare_embeddings(original, packed, batches, pooling, run.advance("Embedding", len(encoded), "lines"))
    return reports, f"{used}, pooling {pooling}"


def _text_classes(run: _Run) -> tuple[Sequence[Report], str]:
    original, *packed = run.models
    lines, classes = read_lines(run.data), class_of(original)
    for line in lines:
        if line.answer is not None and line.answer not in classes:
            raise ModelError(
                f"{run.data}: line {line.number}: label {line.answer[:40]!r} after the tab is not one of the model's: "
                f"{some_labels(classes)}"
            )
    encoded, used = run.encoded([line.text for line in lines])
    labels = None if lines[0].answer is None else [classes[str(line.answer)] for line in lines[: len(encoded)]]
    batches = text_batches(run.processor, original, encoded)
    reports = compare_classifiers(original, packed, batches, labels, run.advance("Classifying", len(encoded), "lines"))
    return reports, f"{used}, {'no labels' if labels is None else 'labels given'}"


def _image_classes(run: _Run) -> tuple[Sequence[Report], str]:
    original, *packed = run.models
    files, labels = find_images(run.data, class_of(original))
    batches = image_batches(run.processor, files)
    reports = compare_classifiers(original, packed, batches, labels, run.advance("Classifying", len(files), "images"))
    return reports, f"{len(files):,} images, {'no labels' if labels is None else 'labels given'}"


_REPORTS: dict[str, Callable[..., Report]] = {
    LANGUAGE: LanguageReport,
    SEQ2SEQ: SequenceReport,
    EMBEDDINGS: EmbeddingReport,
    TEXT_CLASSES: ClassReport,
    IMAGE_CLASSES: ClassReport,
}
_METHODS: dict[str, Callable[[_Run], tuple[Sequence[Report], str]]] = {
    LANGUAGE: _language,
    SEQ2SEQ: _sequences,
    EMBEDDINGS: _embeddings,
    TEXT_CLASSES: _text_classes,
    IMAGE_CLASSES: _image_classes,
}
