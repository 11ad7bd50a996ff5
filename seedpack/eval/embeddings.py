"""Compare embeddings of texts: cosine distance, and the order in which texts are retrieved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from seedpack.errors import ModelError
from seedpack.eval.models import Advance, Batch, name_of, outputs_of, run

NEIGHBOURS = 10
ROWS_PER_STEP = 256
TIE = 1e-6  # cosines that differ by less are equal


@dataclass(frozen=True)
class EmbeddingReport:
    """Distances between a text's two embeddings, and shares over all texts, each a query for the others.

    Attributes:
        texts: embedded.
        distance_mean: mean cosine distance (1 - cosine) of a text's packed embedding to its original one.
        distance_max: the largest.
        nearest_agreement: share of texts whose nearest neighbour is the same. What is as near is as good: a tie is no error.
        neighbours: 10, or one less than there are texts.
        neighbours_overlap: mean share of the packed model's so many nearest that are among the original's.
    """

    texts: int
    distance_mean: float
    distance_max: float
    nearest_agreement: float
    neighbours: int
    neighbours_overlap: float

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return asdict(self)


def embed(model: Any, batch: Batch, pooling: str = "mean") -> Tensor:
    """Return the embeddings of texts, of length 1, float32 [texts, hidden].

    Args:
        model: of transformers; a head is left out, and so is a decoder.
        batch: from a tokenizer: `input_ids` and `attention_mask`, int64 [texts, tokens].
        pooling: "mean" over the tokens that the mask has, "cls", the first, or "lasttoken".
    """
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    hidden = getattr(run(model, batch, encoder), "last_hidden_state", None)
    if hidden is None:
        raise ModelError(f"{name_of(model)}: a {type(model).__name__} gives no hidden states of tokens to pool")
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).to(hidden.device)
    if pooling == "mean":
        pooled = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    else:
        positions = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
        index = positions.argmax(1) if pooling == "lasttoken" else mask.argmax(1)
        pooled = hidden.float()[torch.arange(len(hidden), device=hidden.device), index]
    return torch.nn.functional.normalize(pooled, dim=1)


def compare_embeddings(
    original: Any,
    packed: Sequence[Any],
    batches: Iterable[Batch],
    pooling: str = "mean",
    progress: Advance | None = None,
) -> list[EmbeddingReport]:
    """Embed texts by models, and compare.

    Args:
        original: a model of transformers, the reference.
        packed: others with embeddings of the same size.
        batches: texts as `embed` takes them; three at least in all.
        pooling: as `embed` takes it.
        progress: called with the texts embedded since the last call.

    Returns:
        A report for each packed model.
    """
    models = (original, *packed)
    first, *others = outputs_of(
        models, batches, lambda model, batch: embed(model, batch, pooling), "numbers in an embedding", progress
    )
    if len(first) < 3:
        raise ModelError(f"{len(first)} texts have no neighbours to compare; give at least three different lines")
    return [_compare(first, other) for other in others]


def _compare(a: Tensor, b: Tensor) -> EmbeddingReport:
    """Compare unit embeddings [texts, hidden] with those of the original, `a`."""
    distances = (a.double() - b.double()).square().sum(1) / 2
    count = min(NEIGHBOURS, len(a) - 1)
    nearest, overlaps = [], []
    for rows in torch.arange(len(a)).split(ROWS_PER_STEP):
        x, y = _similarities(a, rows), _similarities(b, rows)
        best = x.topk(count).values
        found = x.gather(1, y.argsort(descending=True, stable=True)[:, :count])
        nearest.append(found[:, 0] >= best[:, 0] - TIE)
        overlaps.append((found >= best[:, -1:] - TIE).double().mean(1))
    return EmbeddingReport(
        texts=len(a),
        distance_mean=float(distances.mean()),
        distance_max=float(distances.max()),
        nearest_agreement=float(torch.cat(nearest).double().mean()),
        neighbours=count,
        neighbours_overlap=float(torch.cat(overlaps).mean()),
    )


def _similarities(embeddings: Tensor, rows: Tensor) -> Tensor:
    """Return the cosines of some texts to all, [rows, texts]; -inf to themselves."""
    cosines = embeddings[rows] @ embeddings.T
    cosines[torch.arange(len(rows)), rows] = -torch.inf
    return cosines
