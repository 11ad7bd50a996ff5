"""Tuning of what is cheap once weights are packed: scales of rows, gains of norms, biases. No bit is added.

First each decoder layer, fed what the packed ones before it give, learns to give what the original one did; then the whole
model to predict what the original does (distillation: KL divergence of the next token's distribution, Hinton et al., arXiv
1503.02531). Both on the calibration text, by Adam. Packed weights stand still; each of their rows has a factor, which its
scale takes up in the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.converter.calibration.hessians import evaluated
from seedpack.converter.calibration.layerwise import (
    Fed,
    Watch,
    decoder_layers,
    differentiable,
    first_input,
    hidden_in,
    joined,
    layer_by_layer,
    recomputed,
    slices,
)
from seedpack.loader.layers import is_transposed

RATE = 1e-3  # learning rate of factors
TOKENS_AT_ONCE = 1024  # of a step
WARM_UP = 4  # steps


@dataclass(frozen=True)
class Tuned:
    """What was learnt.

    Attributes:
        factors: of the rows of packed weights [out], by the names given.
        values: of other parameters, by their names.
    """

    factors: dict[str, Tensor]
    values: dict[str, Tensor]


def tune(
    student: Any,
    teacher: Any,
    rows: Mapping[str, str],
    values: list[str],
    tokens: Tensor,
    *,
    epochs: int = 1,
    seed: int = 0,
    watch: Watch | None = None,
) -> Tuned:
    """Tune a causal language model with decoded weights to another.

    Args:
        student: of transformers; its parameters are as they were afterwards.
        teacher: the original.
        rows: weights of linear layers and embeddings, by parameter, and the name of their factors: tied ones share it.
        values: names of parameters to tune as they are, as norms' gains and biases.
        tokens: int64 [n, context].
        epochs: passes over the tokens, of the whole model.
        seed: of their order.
        watch: called with (what is done, units done since the last call, units in all).
    """
    if not rows and not values:
        return Tuned({}, {})
    before = {name: student.get_parameter(name).detach().clone() for name in values}
    steps = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    try:
        with _row_factors(student, rows) as factors, differentiable(student, values) as tuned, evaluated(teacher):
            settle(student, teacher, rows, factors, dict(zip(values, tuned, strict=True)), steps, watch)
            distil(student, teacher, [*factors.values()], tuned, steps, epochs, watch)
            learnt = {name: parameter.detach().clone() for name, parameter in zip(values, tuned, strict=True)}
    finally:
        with torch.no_grad():
            for name, value in before.items():
                student.get_parameter(name).copy_(value)
    return Tuned({name: factor.detach() for name, factor in factors.items()}, learnt)


def settle(
    student: Any, teacher: Any, rows: Mapping[str, str], factors: Mapping[str, Tensor], values: Mapping[str, nn.Parameter],
    tokens: Tensor, watch: Watch | None = None,
) -> None:  # fmt: skip
    """One pass over the tokens for each decoder layer, in order: least squared error of each token's output over the squared
    norm of the original's, as the norm that follows divides by it. Originals are fed by originals."""
    layers, hidden, here = decoder_layers(student), first_input(student, tokens), _batches(tokens)

    def call(name: str, forward: Any, fed: Fed) -> Any:
        nonlocal hidden
        fed.require_one_stream(teacher, tokens)
        inside = f"{name}."
        own = {rows[p]: factors[rows[p]] for p in rows if p.startswith(inside)}.values()
        gains = [value for key, value in values.items() if key.startswith(inside)]
        optimiser = _Adam([*own], gains) if own or gains else None
        outputs = []
        for share, part in zip(_shares(len(here)), here, strict=True):
            outputs.append(fed.some(forward, part))
            if optimiser is None:
                continue
            with torch.enable_grad():
                wanted = hidden_in(outputs[-1]).float()
                found = hidden_in(fed.some(layers[name], part, hidden[part])).float()
                error = (found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)
                optimiser.learn(error.mean(), share)
        hidden = torch.cat([hidden_in(fed.some(layers[name], part, hidden[part])) for part in here])
        if watch:
            watch("Tuning, layers", 1, len(layers))
        return joined(outputs)

    with layer_by_layer(teacher, call), torch.no_grad():
        teacher.base_model(input_ids=tokens.to(teacher.device), use_cache=False)


def distil(
    student: Any, teacher: Any, factors: Sequence[Tensor], values: Sequence[nn.Parameter], tokens: Tensor, epochs: int,
    watch: Watch | None = None,
) -> None:  # fmt: skip
    """Least KL divergence of a model to another over all tokens, some at a time; activations are recomputed."""
    batches = _batches(tokens) * epochs
    optimiser = _Adam(factors, values)
    with recomputed(student):
        for share, part in zip(_shares(len(batches)), batches, strict=True):
            ids = tokens[part].to(student.device)
            with torch.no_grad():
                wanted = teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            found = student(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            loss = nn.functional.kl_div(
                found.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean"
            )
            optimiser.learn(loss, share)
            if watch:
                watch("Tuning, tokens", ids.numel(), tokens.numel() * epochs)


class _Adam(torch.optim.Adam):
    """Adam whose rates are relative to what values are: factors to 1, others to their root mean square."""

    def __init__(self, factors: Sequence[Tensor], values: Sequence[Tensor]):
        groups: list[dict[str, Any]] = [{"params": [*factors], "rate": RATE}] if factors else []
        groups += [{"params": [p], "rate": RATE * max(1e-6, float(p.detach().square().mean().sqrt()))} for p in values]
        super().__init__(groups, betas=(0.9, 0.98))

    def learn(self, loss: Tensor, share: float) -> None:
        """One step at a share of the rates."""
        for group in self.param_groups:
            group["lr"] = share * group["rate"]
        self.zero_grad()
        loss.backward()
        self.step()


def _shares(steps: int) -> Iterable[float]:
    """Of the learning rate at each step: up, and down along a cosine."""
    return (min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps))


def _batches(tokens: Tensor) -> list[slice]:
    return slices(len(tokens), max(1, TOKENS_AT_ONCE // tokens.shape[1]))


@contextmanager
def _row_factors(student: Any, rows: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Factors of the rows of weights, by name, which outputs are multiplied by."""
    factors: dict[str, Tensor] = {}
    hooks = []
    try:
        for parameter, name in rows.items():
            layer, weight = student.get_submodule(parameter.rpartition(".")[0]), student.get_parameter(parameter)
            count = len(weight) if not is_transposed(layer) else weight.shape[1]
            factor = factors.setdefault(name, torch.ones(count, device=weight.device, requires_grad=True))
            hooks.append(
                layer.register_forward_hook(lambda layer, args, out, factor=factor: _scaled(layer, args, out, factor))
            )
        yield factors
    finally:
        for hook in hooks:
            hook.remove()


def _scaled(layer: nn.Module, args: tuple[Any, ...], out: Tensor, factor: Tensor) -> Tensor:
    """A layer's output with the rows of its weight times a factor."""
    if isinstance(layer, nn.Embedding):
        return out * factor[args[0]][..., None]
    bias = getattr(layer, "bias", None)
    return out * factor if bias is None else (out - bias) * factor + bias
