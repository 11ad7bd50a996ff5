"""Distil a trained block into a fast feedforward layer, on the inputs that the block sees."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch import nn as torch_nn

from seedpack.errors import ModelError
from seedpack.kernels.feedforward import ACTIVATIONS
from seedpack.nn.fast_feedforward import FastFeedforward

BATCH = 4096  # tokens that pass the block at a time
PER_LEAF = 32  # tokens of each leaf in a training step
OVERLAP = 0.1  # of a node's tokens, that many on either side of its boundary train both of its sides


def fastfeedforward_from(
    mlp: torch_nn.Module,
    data: Tensor | Iterable[Tensor],
    depth: int,
    leaf_width: int,
    *,
    activation: str = "gelu",
    steps: int = 2000,
    lr: float = 2e-3,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> FastFeedforward:
    """Distil a block [..., in] -> [..., out] into a fast feedforward layer, in evaluation mode.

    The tree comes from the data: each node halves its tokens by the direction in which inputs and outputs covary most, and
    those near the boundary count on both sides (1.2^depth times the tokens: a deep leaf has few of its own). A leaf starts,
    where the block is linear, activation, linear, as those hidden units that do most for its tokens, and its leaf bias as
    what the others do on average; then the leaves are trained on the block's outputs (Adam, squared error).

    Args:
        mlp: the block; it is only run.
        data: the inputs that it sees in its model, [tokens, …, in] or batches of them; at least as many tokens as leaves.
        depth: of the tree.
        leaf_width: hidden units of a leaf.
        activation: of the leaves: the block's own.
        steps: of training; each takes 32 tokens of each leaf.
        lr: Adam's learning rate, which falls to zero along a half cosine.
        seed: of the choice of tokens.
        progress: called with the steps done and the relative error ‖y - ŷ‖² / ‖y - mean‖² of the last one.

    Raises:
        ModelError: the block or the data do not fit.
    """
    data = (data,) if isinstance(data, Tensor) else data
    batches = [batch.detach().reshape(-1, batch.shape[-1]) for batch in data]
    tokens = sum(map(len, batches))
    if tokens == 0 or tokens < 2**depth:
        raise ModelError(f"{tokens} tokens for {2**depth} leaves: give more data or a smaller depth")
    if len(widths := {batch.shape[-1] for batch in batches}) > 1:
        raise ModelError(f"batches of inputs of different widths: {', '.join(map(str, sorted(widths)))}; expected one")
    x = torch.cat(batches)
    mlp = copy.deepcopy(mlp).eval()
    try:
        with torch.no_grad():
            y = torch.cat([mlp(batch) for batch in x.split(BATCH)])
    except RuntimeError as error:
        raise ModelError(f"the block does not take inputs {list(x.shape)} of {x.dtype}: {error}") from error
    if y.shape[:-1] != x.shape[:-1]:
        raise ModelError(f"the block turns {list(x.shape)} into {list(y.shape)}; expected [{len(x)}, out]")
    dtype, x, y = x.dtype, x.float(), y.float()
    if not bool(torch.isfinite(y).all() & torch.isfinite(x).all()):
        raise ModelError("the block's inputs or outputs hold NaN or Inf")
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(seed)
        layer = FastFeedforward(x.shape[1], y.shape[1], depth, leaf_width, activation=activation).to(x.device)
        regions = _grow(layer, x, y)
        _start_leaves(layer, mlp, x, y, regions)
        _train_leaves(layer, x, y, regions, steps, lr, progress)
    return layer.to(dtype).eval()


@torch.no_grad()
def _grow(layer: FastFeedforward, x: Tensor, y: Tensor) -> list[Tensor]:
    """Set the nodes, level by level; return the tokens that train each leaf, at least one.

    A boundary halves the tokens that go to its node; others of `near`, from beyond the boundaries above, train it too.
    """
    regions = [(torch.arange(len(x), device=x.device), torch.ones(len(x), dtype=torch.bool, device=x.device))]
    for node in range(2**layer.depth - 1):
        near, goes = regions.pop(0)
        centre = x[near].mean(0)
        covariance = (x[near] - centre).T @ (y[near] - y[near].mean(0))
        direction = torch.svd_lowrank(covariance, q=min(4, *covariance.shape))[0][:, 0]
        score, order = (x[near] @ direction).sort(stable=True)
        near, goes = near[order], goes[order]
        places = goes.nonzero()[:, 0]
        half = (len(places) + 1) // 2
        middle = score[places[half - 1 : half + 1]].mean()
        scale = (score - middle).abs().mean().clamp_min(1e-6)
        layer.nodes.weight[node], layer.node_bias[node] = direction / scale, -middle / scale
        cut, margin = int(places[half - 1]) + 1, math.ceil(OVERLAP * len(near))
        left, right = slice(cut + margin), slice(max(0, cut - margin), None)
        goes_left = goes & (torch.arange(len(near), device=x.device) < cut)
        regions += [(near[left], goes_left[left]), (near[right], (goes & ~goes_left)[right])]
    return [near for near, _ in regions]


@torch.no_grad()
def _start_leaves(layer: FastFeedforward, mlp: torch_nn.Module, x: Tensor, y: Tensor, tokens: list[Tensor]) -> None:
    width, units = layer.leaf_width, _two_layers(mlp, x.shape[1], y.shape[1])
    for leaf, mine in enumerate(tokens):
        mean = y[mine].mean(0)
        layer.out_bias[leaf] = mean
        if units is None:
            layer.leaf_out.weight[leaf * width : (leaf + 1) * width] = 0
            continue
        first, bias, second = units
        hidden = ACTIVATIONS[layer.activation](torch_nn.functional.linear(x[mine], first, bias))
        work = hidden.var(0, correction=0) * second.square().sum(0)
        busiest = work.topk(min(width, len(work))).indices
        rows = slice(leaf * width, leaf * width + len(busiest))
        layer.leaf_in.weight[rows], layer.in_bias[leaf, : len(busiest)] = first[busiest], bias[busiest]
        layer.leaf_out.weight[rows] = second[:, busiest].T
        layer.leaf_out.weight[rows.stop : (leaf + 1) * width] = 0
        layer.out_bias[leaf] = mean - hidden[:, busiest].mean(0) @ second[:, busiest].T


def _two_layers(mlp: torch_nn.Module, columns: int, outputs: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return weight and bias of the first linear layer and the weight of the second, where a block has just these."""
    linear = [module for module in mlp.modules() if isinstance(module, torch_nn.Linear)]
    if len(linear) != 2 or (linear[0].in_features, linear[1].out_features) != (columns, outputs):
        return None
    first, second = linear
    if first.out_features != second.in_features:
        return None
    bias = (
        torch.zeros(first.out_features, dtype=torch.float32, device=first.weight.device)
        if first.bias is None
        else first.bias
    )
    return first.weight.float(), bias.float(), second.weight.float()


def _train_leaves(
    layer: FastFeedforward,
    x: Tensor,
    y: Tensor,
    tokens: list[Tensor],
    steps: int,
    lr: float,
    progress: Callable[[int, float], None] | None,
) -> None:
    """Train all leaves side by side, each on tokens of its own."""
    shape = (len(tokens), layer.leaf_width, -1)
    trained = [layer.leaf_in.weight, layer.in_bias, layer.leaf_out.weight, layer.out_bias]
    optimiser = torch.optim.Adam(trained, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    spread = (y - y.mean(0)).square().mean().clamp_min(1e-30)
    lengths = torch.tensor([len(mine) for mine in tokens], device=x.device)
    table = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    for step in range(steps):
        pick = (torch.rand(len(tokens), PER_LEAF, dtype=torch.float32, device=x.device) * lengths[:, None]).long()
        index = table.gather(1, pick)  # [leaves, PER_LEAF]
        hidden = torch.baddbmm(layer.in_bias[:, None], x[index], layer.leaf_in.weight.view(shape).mT)
        out = torch.baddbmm(
            layer.out_bias[:, None], ACTIVATIONS[layer.activation](hidden), layer.leaf_out.weight.view(shape)
        )
        loss = (out - y[index]).square().mean() / spread
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress:
            progress(step + 1, float(loss.detach()))
