"""Tuning of what is cheap once weights are packed: scales of rows, gains of norms, biases. No bit is added.

The packed model learns to predict what the original does (distillation: KL divergence of the next token's distribution,
Hinton et al., arXiv 1503.02531) on the calibration text, by Adam. Packed weights stand still; each of their rows has a
factor, which its scale takes up in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.calibration.hessians import evaluated
from seedpack.calibration.layerwise import differentiable
from seedpack.model.layers import is_transposed

RATE, TOKENS_AT_ONCE, WARM_UP = 1e-3, 1024, 4  # learning rate of factors; tokens and count of steps


@dataclass(frozen=True)
class Tuned:
    """What was learnt.

    Attributes:
        factors: of the rows of packed weights [out], by the names given.
        values: of other parameters, by their names.
    """

    factors: dict[str, Tensor]
    values: dict[str, Tensor]


def distil(
    student: Any,
    teacher: Any,
    rows: Mapping[str, str],
    values: list[str],
    tokens: Tensor,
    *,
    epochs: int = 1,
    seed: int = 0,
    watch: Callable[[int], None] | None = None,
) -> Tuned:
    """Tune a causal language model with decoded weights to another.

    Args:
        student: of transformers; its parameters are as they were afterwards.
        teacher: the original.
        rows: weights of linear layers and embeddings, by parameter, and the name of their factors: tied ones share it.
        values: names of parameters to tune as they are, as norms' gains and biases.
        tokens: int64 [n, context].
        epochs: passes over the tokens.
        seed: of their order.
        watch: called with the tokens done since the last call.
    """
    before = {name: student.get_parameter(name).detach().clone() for name in values}
    factors: dict[str, Tensor] = {}
    hooks = []
    for parameter, name in rows.items():
        layer, weight = student.get_submodule(parameter.rpartition(".")[0]), student.get_parameter(parameter)
        count = len(weight) if not is_transposed(layer) else weight.shape[1]
        factor = factors.setdefault(name, torch.ones(count, device=weight.device, requires_grad=True))
        hooks.append(
            layer.register_forward_hook(lambda layer, args, out, factor=factor: _scaled(layer, args, out, factor))
        )
    steps = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    batches = steps.split(max(1, TOKENS_AT_ONCE // tokens.shape[1])) * epochs
    try:
        with differentiable(student, values) as tuned:
            groups = [{"params": list(factors.values()), "lr": RATE, "rate": RATE}]
            groups += [
                {"params": [p], "lr": RATE, "rate": RATE * max(1e-6, float(p.detach().square().mean().sqrt()))}
                for p in tuned
            ]
            optimiser = torch.optim.Adam(groups, betas=(0.9, 0.98))
            for step, batch in enumerate(batches):
                ids = batch.to(student.device)
                with torch.no_grad(), evaluated(teacher):
                    wanted = teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
                found = student(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
                loss = nn.functional.kl_div(
                    found.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean"
                )
                share = min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / len(batches))) / 2
                for group in optimiser.param_groups:
                    group["lr"] = share * group["rate"]
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                if watch:
                    watch(batch.numel())
            learnt = {name: parameter.detach().clone() for name, parameter in zip(values, tuned, strict=True)}
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for name, value in before.items():
                student.get_parameter(name).copy_(value)
    return Tuned({name: factor.detach() for name, factor in factors.items()}, learnt)


def _scaled(layer: nn.Module, args: tuple[Any, ...], out: Tensor, factor: Tensor) -> Tensor:
    """A layer's output with the rows of its weight times a factor."""
    if isinstance(layer, nn.Embedding):
        return out * factor[args[0]][..., None]
    bias = getattr(layer, "bias", None)
    return out * factor if bias is None else (out - bias) * factor + bias
