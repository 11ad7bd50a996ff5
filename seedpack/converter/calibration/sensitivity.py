"""Sensitivity of the whole model's KL divergence to errors of each layer's output, from one backward pass.

The text's next tokens stand for samples of the model's own predictions (they are, where it wrote the text, but for the second
one of each sequence, which was drawn from the vocabulary), so that the gradient g of their log-likelihood by a layer's output has E[g·gᵀ] = the Hessian of the KL divergence there (Fisher). An
error e of the output then costs ½·E[(g·e)²]; with errors of channels that know nothing of each other or of g,
½·Σ_r E[g_r²]·E[e_r²], and E[e_r²] is row r of E·H·Eᵀ with the Hessian H of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.converter.calibration.layerwise import differentiable, recomputed
from seedpack.converter.snapshot import Snapshot
from seedpack.converter.sources.base import OpenModel
from seedpack.errors import ModelError
from seedpack.loader.layers import packed_class

COLUMNS = ":columns"
TOKENS_AT_ONCE, ENOUGH_TOKENS = 1024, 8192


def output_sensitivities(
    opened: OpenModel, tokens: Tensor, progress: Callable[[int], None], snapshot: Snapshot | None = None
) -> dict[str, Tensor]:
    """Return ½·E[g_r²] of each output channel of a causal language model's layers, float64 [out], by the names of weights.

    Of an embedding, whose channels are the columns of its weight, under the name and `COLUMNS`. Activations are
    recomputed, not kept.

    Args:
        opened: the model, in memory.
        tokens: int64 [n, context]; not all are needed.
        progress: called with the tokens done since the last call.
        snapshot: where to begin, and where to keep sums; it counts tokens.
    """
    model, snapshot = opened.module, snapshot or Snapshot()
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if packed_class(layer) is not None and isinstance(getattr(layer, "weight", None), nn.Parameter)
    }
    sums = {name: total.to(model.device) for name, total in snapshot.tensors.items()}

    def watch_output(name: str, output: Any) -> None:
        def add_gradient(gradient: Tensor) -> None:
            layer = layers[name]
            last = gradient.detach().movedim(1, -1) if isinstance(layer, (nn.Conv1d, nn.Conv2d)) else gradient.detach()
            channels = last.flatten(0, -2).double().square().sum(0)
            if isinstance(layer, nn.Embedding):  # some scale what they look up
                channels *= float(getattr(layer, "scalar_embed_scale", 1.0)) ** 2
            sums[name] = sums.get(name, torch.zeros_like(channels)) + channels

        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(add_gradient)

    tokens = tokens[: max(1, ENOUGH_TOKENS // tokens.shape[1])]
    with differentiable(model), recomputed(model, opened.layer_names):
        embedding = model.get_input_embeddings()  # gradients flow from its output on
        hooks = [embedding.register_forward_hook(lambda layer, args, out: out.detach().requires_grad_(True))]
        hooks += [
            layer.register_forward_hook(lambda layer, args, out, name=name: watch_output(name, out))
            for name, layer in layers.items()
        ]
        try:
            done = snapshot.done
            progress(done)
            for batch in tokens[done // tokens.shape[1] :].split(max(1, TOKENS_AT_ONCE // tokens.shape[1])):
                ids = batch.to(model.device)
                first = min(1, ids.shape[1] - 2)
                logits = model(input_ids=ids, use_cache=False).logits[:, first:-1].float().flatten(0, 1)
                loss = nn.functional.cross_entropy(logits, ids[:, 1 + first :].flatten(), reduction="sum")
                if not torch.isfinite(loss):
                    raise ModelError("the model's logits on the calibration text are not finite")
                loss.backward()
                done += batch.numel()
                snapshot.keep(done, sums)
                progress(batch.numel())
        finally:
            for hook in hooks:
                hook.remove()
    return {
        f"{name}.weight{COLUMNS if isinstance(layers[name], nn.Embedding) else ''}": (
            total / (2 * tokens.numel())
        ).cpu()
        for name, total in sums.items()
    }
