"""Tuning of what is cheap once weights are packed: scales of rows, gains of norms, biases. No bit is added.

First each decoder layer, fed what the packed ones before it give, learns to give what the original one did; then the whole
model to predict what the original does (distillation: KL divergence of the next token's distribution, Hinton et al., arXiv
1503.02531). Both on the calibration text, by Adam. Packed weights stand still; each of their rows has a factor, which its
scale takes up in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.calibration.hessians import evaluated
from seedpack.calibration.layerwise import decoder_layers, differentiable, first_input, layer_by_layer, some_of
from seedpack.model.layers import is_transposed

RATE, TOKENS_AT_ONCE, WARM_UP = 1e-3, 1024, 4  # learning rate of factors; tokens and count of steps
Watch = Callable[[int], None]


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
    by_layer: bool = True,
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
        by_layer: whether layers are tuned one by one first.
        watch: called with the tokens done since the last call: those of each epoch, and once those of all layers.
    """
    if not rows and not values:
        return Tuned({}, {})
    before = {name: student.get_parameter(name).detach().clone() for name in values}
    steps = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    try:
        with _row_factors(student, rows) as factors, differentiable(student, values) as tuned, evaluated(teacher):
            if by_layer:
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
    """One pass over the tokens for each decoder layer, in order: least error of its output, relative to each token's norm
    (as the norms that follow see it), against the original's, which is fed by originals."""
    layers, count = decoder_layers(student), len(tokens)
    hidden = first_input(student, tokens)

    def call(name: str, forward: Any, args: Any, kwargs: Any) -> Any:
        nonlocal hidden
        inside = f"{name}."
        own = [factors[row] for row in dict.fromkeys(rows[p] for p in rows if p.startswith(inside))]
        gains = [value for key, value in values.items() if key.startswith(inside)]
        optimiser = _Adam(own, gains) if own or gains else None
        here = _batches(count, tokens.shape[1])
        outputs = []
        for share, part in zip(_shares(len(here)), here, strict=True):
            with torch.no_grad():
                outputs.append(forward(*some_of(args, count, part), **some_of(kwargs, count, part)))
            if optimiser is None:
                continue
            wanted = _first(outputs[-1])
            found = _first(_with_hidden(layers[name], hidden[part], args, kwargs, count, part))
            power = wanted.float().square().sum(-1).clamp_min(1e-12)
            optimiser.learn(((found - wanted).float().square().sum(-1) / power).mean(), share)
        with torch.no_grad():
            hidden = torch.cat([_first(_with_hidden(layers[name], hidden[p], args, kwargs, count, p)) for p in here])
        if watch:
            watch(tokens.numel() // len(layers))
        whole = torch.cat([_first(out) for out in outputs])
        return (whole,) if isinstance(outputs[0], tuple) else whole

    with layer_by_layer(decoder_layers(teacher), call), torch.enable_grad():
        teacher.base_model(input_ids=tokens.to(teacher.device), use_cache=False)


def distil(
    student: Any, teacher: Any, factors: Sequence[Tensor], values: Sequence[nn.Parameter], tokens: Tensor, epochs: int,
    watch: Watch | None = None,
) -> None:  # fmt: skip
    """Least KL divergence of a model to another over all tokens, some at a time."""
    batches = _batches(len(tokens), tokens.shape[1]) * epochs
    optimiser = _Adam(factors, values)
    for share, part in zip(_shares(len(batches)), batches, strict=True):
        ids = tokens[part].to(student.device)
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        found = student(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        loss = nn.functional.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")
        optimiser.learn(loss, share)
        if watch:
            watch(ids.numel())


class _Adam(torch.optim.Adam):
    """Adam whose rates are relative to what values are: factors to 1, others to their root mean square."""

    def __init__(self, factors: Sequence[Tensor], values: Sequence[Tensor]):
        groups = [{"params": [factor], "rate": RATE} for factor in factors]
        groups += [{"params": [p], "rate": RATE * max(1e-6, float(p.detach().square().mean().sqrt()))} for p in values]
        super().__init__([{**group, "lr": group["rate"]} for group in groups], betas=(0.9, 0.98))

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


def _batches(sequences: int, context: int) -> list[slice]:
    size = max(1, TOKENS_AT_ONCE // context)
    return [slice(first, min(first + size, sequences)) for first in range(0, sequences, size)]


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def _with_hidden(layer: nn.Module, hidden: Tensor, args: Any, kwargs: Any, count: int, part: slice) -> Any:
    """A layer's output for other hidden states than its arguments have."""
    args, kwargs = some_of(args, count, part), some_of(kwargs, count, part)
    return layer(hidden, *args[1:], **kwargs) if args else layer(**{**kwargs, "hidden_states": hidden})


@contextmanager
def _row_factors(student: Any, rows: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Factors of the rows of weights, by name, which outputs are multiplied by."""
    factors: dict[str, Tensor] = {}
    hooks = []
    for parameter, name in rows.items():
        layer, weight = student.get_submodule(parameter.rpartition(".")[0]), student.get_parameter(parameter)
        count = len(weight) if not is_transposed(layer) else weight.shape[1]
        factor = factors.setdefault(name, torch.ones(count, device=weight.device, requires_grad=True))
        hooks.append(
            layer.register_forward_hook(lambda layer, args, out, factor=factor: _scaled(layer, args, out, factor))
        )
    try:
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
