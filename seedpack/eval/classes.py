"""Compare classifiers of texts or images: agreement, KL divergence, accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from seedpack.errors import ModelError
from seedpack.eval.models import Advance, Batch, name_of, outputs_of, run


@dataclass(frozen=True)
class ClassReport:
    """Means over all inputs.

    Attributes:
        inputs: texts or images.
        agreement: share of inputs for which both models predict the same class.
        kl_mean: mean KL(original ‖ packed) of the distributions over the classes, in nats.
        kl_p99: its 99th percentile.
        accuracy_original: share of inputs for which the original predicts the label; None without labels.
        accuracy_packed: the same of the packed model.
    """

    inputs: int
    agreement: float
    kl_mean: float
    kl_p99: float
    accuracy_original: float | None
    accuracy_packed: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return asdict(self)


def class_of(model: Any) -> dict[str, int]:
    """Return the class of each label that a model's configuration names; numbers are labels too.

    Raises:
        ModelError: the model gives no distribution over classes: one number, or several labels at once.
    """
    names = {int(index): str(name) for index, name in model.config.id2label.items()}
    if len(names) < 2 or getattr(model.config, "problem_type", None) not in (None, "single_label_classification"):
        kind = "several labels at once" if len(names) > 1 else "one number"
        raise ModelError(
            f"{name_of(model)}: gives {kind}; expected a classifier of two or more classes, of which one holds"
        )
    return {str(index): index for index in names} | {name: index for index, name in names.items()}


def compare_classifiers(
    original: Any,
    packed: Sequence[Any],
    batches: Iterable[Batch],
    labels: Sequence[int] | None = None,
    progress: Advance | None = None,
) -> list[ClassReport]:
    """Classify inputs by models, and compare.

    Args:
        original: a classifier of transformers, the reference.
        packed: others with as many classes.
        batches: inputs from a tokenizer or an image processor.
        labels: the right class of each input.
        progress: called with the inputs classified since the last call.

    Returns:
        A report for each packed model.
    """
    models = (original, *packed)
    first, *others = outputs_of(models, batches, lambda model, batch: run(model, batch).logits, "classes", progress)
    right = None if labels is None else torch.tensor(labels)
    return [_compare(first, other, right) for other in others]


def _compare(a: Tensor, b: Tensor, labels: Tensor | None) -> ClassReport:
    """Compare logits [inputs, classes] with those of the original, `a`; labels are [inputs]."""
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    classes = a.argmax(-1), b.argmax(-1)
    accuracies = (None if labels is None else float((found == labels).double().mean()) for found in classes)
    accuracy_original, accuracy_packed = accuracies
    return ClassReport(
        inputs=len(a),
        agreement=float((classes[0] == classes[1]).double().mean()),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        accuracy_original=accuracy_original,
        accuracy_packed=accuracy_packed,
    )
