"""Run models side by side on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seedpack.errors import ModelError, first_line

Batch = Mapping[str, Tensor]  # inputs of a model by name, the first axis over texts or images
Advance = Callable[[int], None]  # called with the units done since the last call


def name_of(model: Any) -> str:
    """Return the path or id that a model was loaded from, or its class."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def run(model: Any, batch: Batch, call: Callable[..., Any] | None = None) -> Any:
    """Return what a model gives for a batch, or what one of its methods or modules does (`call`).

    Raises:
        ModelError: it fails.
    """
    model.eval()
    try:
        return (call or model)(**{key: value.to(model.device) for key, value in batch.items()})
    except MemoryError:
        raise
    except Exception as error:  # the model's own
        raise ModelError(
            f"{name_of(model)}: a {type(model).__name__} cannot run on this ({first_line(error)})"
        ) from error


@torch.inference_mode()
def outputs_of(
    models: Sequence[Any],
    batches: Iterable[Batch],
    output: Callable[[Any, Batch], Tensor],
    what: str,
    progress: Advance | None = None,
) -> list[Tensor]:
    """Return the outputs of several models for all batches, float32 [inputs, n] each.

    Args:
        models: of transformers; the first is the original.
        batches: are read once.
        output: gives a model's output for a batch, [inputs of the batch, n].
        what: n counts, for messages.
        progress: called with inputs.

    Raises:
        ModelError: a model has another n than the original, or gives numbers that are not finite.
    """
    parts: list[list[Tensor]] = [[] for _ in models]
    for batch in batches:
        for model, rows in zip(models, parts, strict=True):
            rows.append(output(model, batch).float().cpu())
            require_same_size(models[0], model, parts[0][-1], rows[-1], what)
            require_finite(model, rows[-1])
        if progress:
            progress(len(parts[0][-1]))
    return [torch.cat(rows) for rows in parts]


def require_same_size(original: Any, model: Any, expected: Tensor, found: Tensor, what: str) -> None:
    """Refuse a model whose outputs are not as wide as the original's."""
    if expected.shape[-1] != found.shape[-1]:
        raise ModelError(
            f"{name_of(model)} has {found.shape[-1]} {what}, but {name_of(original)} has {expected.shape[-1]}; "
            "compare models that are packed from the same one"
        )


def require_finite(model: Any, values: Tensor) -> None:
    """Refuse a model whose outputs are not finite."""
    if not torch.isfinite(values).all():
        raise ModelError(f"{name_of(model)}: gives outputs that are not finite on this")
