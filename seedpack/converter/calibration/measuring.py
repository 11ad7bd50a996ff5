"""Budgets by the divergence that a packed model has: each tensor's share of it, from one backward pass, and its check.

Let E be the error of a weight, and KL(t) the divergence of the model whose packed weights have t·E for it. The divergence is nearly
quadratic in t, and errors of different tensors hardly meet: so ½·∂KL/∂t at t = 1, which is ½·⟨∂KL/∂Ŵ, E⟩, is the share of the
tensor. It scales with the tensor's error. A plan by these shares is packed and measured in its turn, on other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.converter.calibration.layerwise import differentiable, recomputed

TOKENS = 8192  # that the shares are measured on, and as many that plans are compared on
TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class Pair:
    """A causal language model of transformers, and a copy in float32 with packed weights, decoded.

    Attributes:
        original: the model.
        packed: the copy.
        layer_names: of their decoder layers.
        tensors: by parameter, the name of the tensor that it is packed as; tied ones share it.
    """

    original: Any
    packed: Any
    layer_names: Sequence[str]
    tensors: Mapping[str, str]


def shares(pair: Pair, tokens: Tensor, progress: Callable[[int], None]) -> dict[str, float]:
    """Return each packed tensor's share of the divergence, in nats per token, by name; noise can make small ones negative.

    What the tokens do not reach, as what sees images, has none.

    Activations are recomputed, and a gradient is let go as soon as it is there.

    Args:
        pair: the models.
        tokens: int64 [n, context].
        progress: called with the tokens done since the last call.
    """
    found = dict[str, float]()
    packed = dict(pair.packed.named_parameters())
    names = [name for name in pair.tensors if name in packed]  # tied ones once

    def add(name: str, weight: nn.Parameter) -> None:
        assert weight.grad is not None
        error = weight.detach() - pair.original.get_parameter(name).detach().float()
        share = float((weight.grad * error).sum()) / (2 * tokens.numel())
        found[pair.tensors[name]] = found.get(pair.tensors[name], 0.0) + share
        weight.grad = None

    with differentiable(pair.packed, names) as weights, recomputed(pair.packed, pair.layer_names):
        hooks = [
            weight.register_post_accumulate_grad_hook(lambda weight, name=name: add(name, weight))
            for name, weight in zip(names, weights, strict=True)
        ]
        try:
            # A copy: what a model wrote in inference mode takes no part in gradients.
            for batch in _batches(tokens.clone()):
                ids = batch.to(pair.packed.device)
                with torch.no_grad():
                    wanted = pair.original(input_ids=ids, use_cache=False).logits.float().softmax(-1)
                logits = pair.packed(input_ids=ids, use_cache=False).logits
                if not logits.requires_grad:  # of nothing that is packed
                    break
                logits.backward(logits.detach().float().softmax(-1) - wanted)  # the divergence's gradient
                progress(ids.numel())
        finally:
            for hook in hooks:
                hook.remove()
    return found


@torch.no_grad()
def divergence(pair: Pair, tokens: Tensor, progress: Callable[[int], None]) -> float:
    """Return the mean divergence of the packed model's next tokens from the original's, in nats per token of [n, context]."""
    total = 0.0
    for batch in _batches(tokens):
        ids = batch.to(pair.packed.device)
        wanted = pair.original(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        found = pair.packed(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        total += float(nn.functional.kl_div(found, wanted, log_target=True, reduction="sum"))
        progress(ids.numel())
    return total / tokens.numel()


def _batches(tokens: Tensor) -> tuple[Tensor, ...]:
    batches: tuple[Tensor, ...] = tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1]))
    return batches


def halves(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return sequences to measure shares on, and others to compare plans on, where there are more than one."""
    count = max(1, min(TOKENS // tokens.shape[1], len(tokens) // 2))
    return tokens[:count], tokens[-count:]


def costs(found: Mapping[str, float], tensors: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Return the cost of a relative error of 1 in each tensor.

    A share is taken for no less than a tenth of what the tensor would have by its size, below which noise decides.

    Args:
        found: shares.
        tensors: the relative errors that they had, and their counts of weights.
    """
    per_weight = sum(found.values()) / sum(tensors[name][1] for name in found)
    return {name: max(share, 0.1 * per_weight * tensors[name][1]) / tensors[name][0] for name, share in found.items()}
