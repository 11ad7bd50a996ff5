"""Tuning of scales of rows, gains of norms and biases once weights are packed. No bit is added.

First each decoder layer, with the inputs that the packed ones before it give, learns the output of the original one; then
the whole model learns the predictions of the original (distillation: KL divergence of the next token's distribution,
Hinton et al., arXiv 1503.02531). Both on the calibration text, by Adam. Packed weights stand still; each of their rows has
a factor, which its scale takes up in the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.converter.calibration.layerwise import (
    LayerInputs,
    differentiable,
    first_input,
    hidden_in,
    joined,
    layer_by_layer,
    recomputed,
    run_to_head,
    slices,
)
from seedpack.converter.calibration.moments import evaluated
from seedpack.converter.options import Progress, silent
from seedpack.converter.snapshot import Snapshot
from seedpack.errors import ModelError
from seedpack.loader.layers import is_transposed

RATE = 6e-3  # learning rate of factors over the relative error of the weights: what is lost less is to be changed less
TOKENS_AT_ONCE = 256  # of a step
WARM_UP = 4  # steps


@dataclass(frozen=True)
class Student:
    """A causal language model of transformers whose packed weights are decoded.

    Attributes:
        model: its parameters are as they were afterwards.
        layer_names: of its decoder layers, which are the teacher's too.
        rows: weights of linear layers and embeddings, by parameter, and the name of their factors: tied ones share it.
        values: names of parameters to tune as they are, as norms' gains and biases.
    """

    model: Any
    layer_names: Sequence[str]
    rows: Mapping[str, str]
    values: Sequence[str]


@dataclass(frozen=True)
class Tuned:
    """The result of tuning.

    Attributes:
        factors: of the rows of packed weights [out], by the names given.
        values: of other parameters, by their names.
    """

    factors: dict[str, Tensor]
    values: dict[str, Tensor]


def tune(
    student: Student,
    teacher: Any,
    tokens: Tensor,
    *,
    epochs: int = 1,
    seed: int = 0,
    progress: Progress = silent,
    snapshot: Snapshot | None = None,
) -> Tuned:
    """Tune a causal language model with decoded weights to another.

    Args:
        student: the model to tune.
        teacher: the original.
        tokens: int64 [n, context].
        epochs: passes over the tokens, of the whole model.
        seed: of their order.
        progress: told of layers and tokens.
        snapshot: where to begin, and where to keep what is learnt; it counts layers, and then steps. The result is the same.
    """
    if not student.rows and not student.values:
        return Tuned({}, {})
    model, snapshot, layers = student.model, snapshot or Snapshot(), len(student.layer_names)
    rate = RATE * _relative_error(model, teacher)
    before = {name: model.get_parameter(name).detach().clone() for name in student.values}
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    try:
        with _row_factors(student) as factors, differentiable(model, student.values) as tuned, evaluated(teacher):
            values = dict(zip(student.values, tuned, strict=True))
            learner = _Learner(factors, values, rate, snapshot)
            if snapshot.done:
                goal = layers + epochs * len(_batches(tokens))
                progress("Resuming", 0, 0, "", f"resuming: {snapshot.done} of {goal} layers and steps tuned")
            if snapshot.done < layers:
                tune_layers(student, teacher, learner, shuffled, progress)
            distil(student, teacher, learner, shuffled, epochs, progress)
            learnt = {name: parameter.detach().clone() for name, parameter in values.items()}
    finally:
        with torch.no_grad():
            for name, value in before.items():
                model.get_parameter(name).copy_(value)
    return Tuned({name: factor.detach() for name, factor in factors.items()}, learnt)


class _Learner:
    """The factors and values that are learnt, from their last state on.

    Args:
        factors: by name.
        values: by parameter.
        rate: relative to each.
        snapshot: the state.
    """

    def __init__(
        self, factors: Mapping[str, Tensor], values: Mapping[str, nn.Parameter], rate: float, snapshot: Snapshot
    ):
        self.factors, self.values, self.rate, self.snapshot = factors, values, rate, snapshot
        self._tensors = {f"factor {n}": t for n, t in factors.items()} | {f"value {n}": t for n, t in values.items()}
        if snapshot.done:
            with torch.no_grad():
                for name, tensor in self._tensors.items():
                    tensor.copy_(snapshot.tensors[name])

    def keep(self, done: int, optimiser: _Adam | None = None) -> None:
        """Keep the state, and that of the optimiser if the next step needs it."""
        self.snapshot.keep(done, self._tensors if optimiser is None else self._tensors | optimiser.tensors())


def tune_layers(student: Student, teacher: Any, learner: _Learner, tokens: Tensor, progress: Progress) -> None:
    """Make one pass over the tokens for each decoder layer, in order.

    The loss is the squared error of each token's output over the squared norm of the original's, as the norm that
    follows divides by it. The teacher's layers take the teacher's inputs.
    """
    layers = {name: student.model.get_submodule(name) for name in student.layer_names}
    hidden, batches, done = first_input(student.model, student.layer_names, tokens), _batches(tokens), 0

    def call(name: str, forward: Any, inputs: LayerInputs) -> Any:
        nonlocal hidden, done
        done += 1
        inputs.require_tokens(teacher, tokens)
        prefix = f"{name}."
        own = {key: learner.factors[key] for parameter, key in student.rows.items() if parameter.startswith(prefix)}
        gains = [value for key, value in learner.values.items() if key.startswith(prefix)]
        learns = (own or gains) and done > learner.snapshot.done
        optimiser = _Adam([*own.values()], gains, learner.rate) if learns else None
        outputs = []
        for share, batch in zip(_shares(len(batches)), batches, strict=True):
            outputs.append(inputs.run_batch(forward, batch))
            if optimiser is None:
                continue
            with torch.enable_grad():
                target = hidden_in(outputs[-1]).float()
                output = hidden_in(inputs.run_batch(layers[name], batch, hidden[batch])).float()
                error = (output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)
                optimiser.learn(error.mean(), share)
        hidden = torch.cat([hidden_in(inputs.run_batch(layers[name], batch, hidden[batch])) for batch in batches])
        learner.keep(done)
        progress("Tuning layers", 1, len(layers), "layers")
        return joined(outputs)

    with layer_by_layer(teacher, student.layer_names, call), torch.no_grad():
        run_to_head(teacher, tokens)


def distil(student: Student, teacher: Any, learner: _Learner, tokens: Tensor, epochs: int, progress: Progress) -> None:
    """Minimise the KL divergence of a model to another over all tokens, some at a time; activations are recomputed."""
    model, batches, layers = student.model, _batches(tokens) * epochs, len(student.layer_names)
    optimiser = _Adam([*learner.factors.values()], [*learner.values.values()], learner.rate)
    if learner.snapshot.done > layers:
        optimiser.load(learner.snapshot.tensors)
    with recomputed(model, student.layer_names):
        for done, share, batch in zip(count(layers + 1), _shares(len(batches)), batches):
            if done <= learner.snapshot.done:
                progress("Tuning", tokens[batch].numel(), tokens.numel() * epochs, "tokens")
                continue
            ids = tokens[batch].to(model.device)
            with torch.no_grad():
                target = teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            output = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            loss = nn.functional.kl_div(
                output.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean"
            )
            optimiser.learn(loss, share)
            learner.keep(done, optimiser)
            progress("Tuning", ids.numel(), tokens.numel() * epochs, "tokens")


class _Adam(torch.optim.Adam):
    """Adam with rates relative to the values: of factors to 1, of others to their root mean square."""

    def __init__(self, factors: Sequence[Tensor], values: Sequence[Tensor], rate: float):
        groups: list[dict[str, Any]] = [{"params": [*factors], "rate": rate}] if factors else []
        groups += [{"params": [p], "rate": rate * max(1e-6, float(p.detach().square().mean().sqrt()))} for p in values]
        super().__init__(groups, betas=(0.9, 0.98))

    def learn(self, loss: Tensor, share: float) -> None:
        """Take one step at a share of the rates."""
        if not loss.isfinite():
            raise ModelError("tuning: the model's predictions on the text are no finite numbers; leave tuning out")
        for group in self.param_groups:
            group["lr"] = share * group["rate"]
        self.zero_grad()
        loss.backward()
        self.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state."""
        moments = {f"{i} {key}": value for i, own in self.state_dict()["state"].items() for key, value in own.items()}
        return {"rates": torch.tensor([group["rate"] for group in self.param_groups], dtype=torch.float64), **moments}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state of another, which `tensors` returned, among other tensors."""
        state = self.state_dict()
        for group, rate in zip(state["param_groups"], tensors["rates"].tolist(), strict=True):
            group["rate"] = rate
        for name, value in tensors.items():
            if (index := name.partition(" ")[0]).isdecimal():
                state["state"].setdefault(int(index), {})[name.partition(" ")[2]] = value
        self.load_state_dict(state)


def _relative_error(model: Any, other: Any) -> float:
    """Return the norm of what changed weights of a model lack of another's, over the norm of those; of those that are finite."""
    error = total = 0.0
    for name, weight in other.named_parameters():
        difference = float((model.get_parameter(name).detach().float() - weight.detach()).square().sum())
        if difference and math.isfinite(difference):
            error, total = error + difference, total + float(weight.detach().float().square().sum())
    return math.sqrt(error / total) if total else 0.0


def _shares(steps: int) -> Iterable[float]:
    """Return the share of the learning rate at each step: up, and down along a cosine."""
    return (min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps))


def _batches(tokens: Tensor) -> list[slice]:
    return slices(len(tokens), max(1, TOKENS_AT_ONCE // tokens.shape[1]))


@contextmanager
def _row_factors(student: Student) -> Iterator[dict[str, Tensor]]:
    """Multiply the outputs of layers by factors of the rows of their weights; yield the factors by name."""
    factors: dict[str, Tensor] = {}
    hooks = []
    try:
        for parameter, name in student.rows.items():
            layer = student.model.get_submodule(parameter.rpartition(".")[0])
            weight = student.model.get_parameter(parameter)
            length = len(weight) if not is_transposed(layer) else weight.shape[1]
            factor = factors.setdefault(
                name, torch.ones(length, dtype=torch.float32, device=weight.device, requires_grad=True)
            )
            hooks.append(
                layer.register_forward_hook(lambda layer, args, out, factor=factor: _scaled(layer, args, out, factor))
            )
        yield factors
    finally:
        for hook in hooks:
            hook.remove()


def _scaled(layer: nn.Module, args: tuple[Any, ...], out: Tensor, factor: Tensor) -> Tensor:
    """Return a layer's output with the rows of its weight times a factor."""
    if isinstance(layer, nn.Embedding):
        return out * factor[args[0]][..., None]
    bias = getattr(layer, "bias", None)
    return out * factor if bias is None else (out - bias) * factor + bias
