"""Compare causal language models on one text: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from seedpack.converter.calibration.tokens import sequences
from seedpack.errors import ModelError
from seedpack.eval.intervals import Interval, mean_interval
from seedpack.eval.models import Advance, require_finite, require_same_size

LOGITS_PER_STEP = 2**18  # so many stay in a processor's cache while they are compared
STEPS = 16  # of positions in a window
Sample = TypeVar("Sample")


@dataclass(frozen=True)
class NextTokenReport:
    """Means over all scored positions.

    Attributes:
        tokens: positions scored.
        perplexity_original: exp of the mean negative log-likelihood (natural logarithm).
        perplexity_packed: the same of the packed model.
        kl_mean: mean KL(original ‖ packed) of the next-token distributions, in nats.
        kl_p90, kl_p99, kl_p999, kl_max: its percentiles, and the largest.
        top1_agreement: share of positions where both models' likeliest token is the same.
        perplexity_interval, kl_interval, top1_interval: 95% confidence intervals of what the packed model has, by blocks of 256
            positions; None where there are fewer than four.
    """

    tokens: int
    perplexity_original: float
    perplexity_packed: float
    kl_mean: float
    kl_p90: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    top1_agreement: float
    perplexity_interval: Interval | None
    kl_interval: Interval | None
    top1_interval: Interval | None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class LanguageReport(NextTokenReport):
    """Means over all scored positions of windows.

    Attributes:
        context: tokens per window; windows do not overlap, and the first token of each is not scored.
        kl_by_position: the mean divergence of each sixteenth of a window, from its start on (fewer of short windows).
    """

    context: int
    kl_by_position: tuple[float, ...]


def windows(tokenizer: Any, text: str, context: int, tokens: int) -> Tensor:
    """Return the first `tokens` tokens of a text as windows, int64 [n, context]; of a short text, one short window."""
    characters = 8 * tokens + 1000  # tokenizers are slow on what will not be used
    ids = tokenizer(text[:characters], add_special_tokens=False)["input_ids"]
    if len(ids) < 2:
        raise ModelError(f"the text gives {len(ids)} tokens; at least two are needed")
    return sequences(ids[:tokens], tokenizer, context)[: max(1, tokens // context)]


def compare_language_models(
    original: Any, packed: Sequence[Any], ids: Tensor, progress: Advance | None = None
) -> list[LanguageReport]:
    """Score models on windows of tokens, a window on all of them before the next.

    Args:
        original: a causal language model of transformers, the reference of the divergence.
        packed: others with the same vocabulary.
        ids: int64 [windows, context].
        progress: called with the tokens scored since the last call.

    Returns:
        A report for each packed model.
    """

    def logits(model: Any, window: Tensor) -> Tensor:
        return model.eval()(window[None].to(model.device)).logits[0, :-1]  # type: ignore[no-any-return]

    samples = ((window, window[1:]) for window in ids)
    found = compare_next_tokens(original, packed, samples, logits, progress)
    return [
        LanguageReport(
            **measures,
            context=ids.shape[1],
            kl_by_position=tuple(
                float(piece.mean()) for piece in torch.stack(kl).double().mean(0).tensor_split(STEPS) if len(piece)
            ),
        )
        for measures, kl in found
    ]


@torch.inference_mode()
def compare_next_tokens(
    original: Any,
    packed: Sequence[Any],
    samples: Iterable[tuple[Sample, Tensor]],
    logits: Callable[[Any, Sample], Tensor],
    progress: Advance | None = None,
) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """Return the fields of `NextTokenReport` for each packed model, and the divergences of each sample [n].

    Args:
        original: the reference.
        packed: others with the same vocabulary.
        samples: what a model reads, and the tokens that it should give, int64 [n].
        logits: runs a model on a sample, [n, vocabulary].
        progress: called with the tokens of a sample.

    Raises:
        ModelError: vocabularies differ, or logits are not finite.
    """
    nll: list[Tensor] = []
    scores = [_Scores([], [], []) for _ in packed]
    for sample, targets in samples:
        reference = logits(original, sample).cpu()
        nll.append(torch.cat([_nll(_log_softmax(a), target) for a, target in _steps(reference, targets)]))
        require_finite(original, nll[-1])
        for model, score in zip(packed, scores, strict=True):
            values = logits(model, sample).cpu()
            require_same_size(original, model, reference, values, "tokens in its vocabulary")
            score.add(reference, values, targets)
            require_finite(model, score.kl[-1])
            del values  # gigabytes for a large vocabulary: free them before the next model runs
        del reference
        if progress:
            progress(len(targets))
    return [({"perplexity_original": _perplexity(nll), **score.means()}, score.kl) for score in scores]


@dataclass(frozen=True)
class _Scores:
    """A packed model's negative log-likelihoods, divergences and agreements, [n] for each sample."""

    nll: list[Tensor]
    kl: list[Tensor]
    agrees: list[Tensor]

    def add(self, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Take in a sample: logits of the original and of the packed model, [n, vocabulary], and tokens [n]."""
        parts = []
        for a, b, target in _steps(reference, logits, targets):
            a, b = _log_softmax(a), _log_softmax(b)
            parts.append((_nll(b, target), (a.exp() * (a - b)).sum(-1), a.argmax(-1) == b.argmax(-1)))
        for found, values in zip((self.nll, self.kl, self.agrees), zip(*parts, strict=True), strict=True):
            found.append(torch.cat(values))

    def means(self) -> dict[str, Any]:
        nll, kl, agrees = (torch.cat(found).double() for found in (self.nll, self.kl, self.agrees))
        likelihood = mean_interval(nll)
        return {
            "tokens": len(kl),
            "perplexity_packed": _perplexity(self.nll),
            "kl_mean": float(kl.mean()),
            **{f"kl_p{name}": float(kl.quantile(share)) for name, share in (("90", 0.9), ("99", 0.99), ("999", 0.999))},
            "kl_max": float(kl.max()),
            "top1_agreement": float(agrees.mean()),
            "perplexity_interval": likelihood and (math.exp(likelihood[0]), math.exp(likelihood[1])),
            "kl_interval": mean_interval(kl),
            "top1_interval": mean_interval(agrees),
        }


def _steps(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut logits [n, vocabulary] and other rows into pieces of few enough logits."""
    rows = max(1, LOGITS_PER_STEP // logits.shape[1])
    return zip(*(x.split(rows) for x in (logits, *others)), strict=True)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _nll(likelihoods: Tensor, targets: Tensor) -> Tensor:
    return -likelihoods.gather(1, targets[:, None])[:, 0]


def _perplexity(nll: list[Tensor]) -> float:
    return float(torch.cat(nll).double().mean().exp())
