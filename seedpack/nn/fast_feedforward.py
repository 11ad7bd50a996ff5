"""Fast feedforward: a block of which each token uses one small part (Belcak and Wattenhofer, arXiv 2308.14711)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import nn as torch_nn

from seedpack._shapes import require_columns
from seedpack.errors import ModelError
from seedpack.kernels.feedforward import ACTIVATIONS, Tree, fast_feedforward, leaves
from seedpack.loader.layers import PackedModule


class FastFeedforward(torch_nn.Module):
    """A binary tree of depth d whose 2^d leaves are blocks of `leaf_width` hidden units, in place of linear, activation, linear.

    In training a token takes the mean of all leaves, weighted by the sigmoid choices on the way to each (the cost of a dense
    block of 2^d · leaf_width units); add `hardening_loss(model)` to the loss, so that the choices become sure. In evaluation
    it goes by the signs to one leaf: d + leaf_width rows of `in_features` and leaf_width rows of `out_features` are read. Leaf
    biases count in both. The tables are `nn.Embedding`s, whose rows are looked up: every codec packs them, and a packed
    layer decodes only the rows that it needs (and does not train).

    Args:
        in_features: of the input [..., in_features].
        out_features: of the output.
        depth: d, from 0.
        leaf_width: hidden units of a leaf.
        activation: "gelu", "relu" or "silu".
        leak: in training, the probability with which a token's choice at a node is turned round, so that neighbouring leaves
            learn of each other's regions (the original's region leak).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int,
        leaf_width: int,
        *,
        activation: str = "gelu",
        leak: float = 0.0,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ModelError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        sizes = (in_features, out_features, leaf_width)
        whole = all(type(size) is int for size in (*sizes, depth))
        if not whole or min(sizes) < 1 or not 0 <= depth <= 24 or not 0 <= leak < 1:
            raise ModelError(
                f"a fast feedforward layer needs features and leaf_width from 1, a depth of 0 to 24 and a leak from 0 and below "
                f"1; got {in_features}, {out_features}, {leaf_width}, {depth} and {leak}"
            )
        self.in_features, self.out_features, self.depth, self.leaf_width = in_features, out_features, depth, leaf_width
        self.activation, self.leak = activation, leak
        leaf_count = 2**depth
        self.nodes = torch_nn.Embedding(max(1, leaf_count - 1), in_features)
        self.node_bias = torch_nn.Parameter(torch.empty(max(1, leaf_count - 1)))
        self.leaf_in = torch_nn.Embedding(leaf_count * leaf_width, in_features)
        self.in_bias = torch_nn.Parameter(torch.empty(leaf_count, leaf_width))
        self.leaf_out = torch_nn.Embedding(leaf_count * leaf_width, out_features)
        self.out_bias = torch_nn.Parameter(torch.empty(leaf_count, out_features))
        self.entropy: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw nodes and leaves as `nn.Linear` does: uniform in ±1 / √fan_in."""
        of_inputs = (self.nodes.weight, self.node_bias, self.leaf_in.weight, self.in_bias)
        of_leaves = (self.leaf_out.weight, self.out_bias)
        for parameters, fan_in in ((of_inputs, self.in_features), (of_leaves, self.leaf_width)):
            for parameter in parameters:
                torch_nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Route tokens x [..., in_features] through the tree: [..., out_features]."""
        tree = self._tree()
        if not self.training or not tree.dense:
            return fast_feedforward(x, tree, self.activation)
        mixture, self.entropy = self._route(x)
        hidden = torch_nn.functional.linear(x, self.leaf_in.weight, self.in_bias.flatten())
        hidden = ACTIVATIONS[self.activation](hidden).unflatten(-1, self.in_bias.shape) * mixture.unsqueeze(-1)
        y: Tensor = hidden.flatten(-2) @ self.leaf_out.weight + mixture @ self.out_bias
        return y

    def mixture(self, x: Tensor) -> Tensor:
        """Return the share of each leaf that a token takes in training: [..., in_features] -> [..., 2^depth], sums of 1."""
        if isinstance(self.nodes, PackedModule):
            raise ModelError("a packed fast feedforward layer does not train and has no mixture; call leaves() instead")
        return self._route(x)[0]

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixture, and its mean entropy over tokens: that of each node's choice, weighted by the share that arrives."""
        require_columns("fast feedforward", x, self.in_features)
        scores = torch_nn.functional.linear(x, self.nodes.weight, self.node_bias)
        right = scores.sigmoid()
        unsure = (
            torch_nn.functional.softplus(scores) - scores * right
        )  # nats; its gradient is finite where a choice is sure
        if self.leak and self.training:
            right = torch.where(torch.rand_like(right) < self.leak, 1 - right, right)
        share, entropy = torch.ones_like(x[..., :1]), x.new_zeros(())
        for level in range(self.depth):
            nodes = slice(2**level - 1, 2 ** (level + 1) - 1)
            entropy = entropy + (share * unsure[..., nodes]).sum(-1).mean()
            share = torch.stack((share * (1 - right[..., nodes]), share * right[..., nodes]), -1).flatten(-2)
        return share, entropy

    def leaves(self, x: Tensor) -> Tensor:
        """Return the leaf that a token goes to in evaluation: [..., in_features] -> int64 [...]."""
        return leaves(x.reshape(-1, x.shape[-1]), self._tree()).view(x.shape[:-1])

    def _tree(self) -> Tree:
        nodes, leaf_in, leaf_out = [
            table if isinstance(table, PackedModule) else table.weight
            for table in (self.nodes, self.leaf_in, self.leaf_out)
        ]
        return Tree(nodes, self.node_bias, leaf_in, self.in_bias, leaf_out, self.out_bias)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the last pass's entropy, which belongs to its graph."""
        return {**self.__dict__, "entropy": None}

    def extra_repr(self) -> str:
        """Return the shape and the activation."""
        return f"{self.in_features}, {self.out_features}, depth={self.depth}, leaf_width={self.leaf_width}, {self.activation}"


def hardening_loss(model: torch_nn.Module) -> Tensor:
    """Return the paper's hardening loss: the entropy of the choice of a leaf in the last pass in training.

    In nats per token, summed over a model's fast feedforward layers; each node counts by the share of tokens that arrives.

    Raises:
        ModelError: the model has no such layer, or it has not run in training.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, FastFeedforward)]
    entropies = [layer.entropy for layer in layers if layer.entropy is not None]
    if not entropies:
        raise ModelError(f"no entropy: {len(layers)} fast feedforward layers, none has run in training mode")
    return torch.stack(entropies).sum()
