"""Fast feedforward (Belcak and Wattenhofer, arXiv 2308.14711): a binary tree leads each token to one small block, its leaf.

A tree of depth d has 2^d - 1 nodes, level by level, and 2^d leaves. A token at node n goes on to 2n + 2 where
x·row(n) + bias(n) > 0, else to 2n + 1; behind the last level are the leaves. Leaf l has `width` hidden units, rows l·width on
of two tables: y = act(x·leaf_inᵀ + in_bias)·leaf_out + out_bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Lookup = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


class Tree(NamedTuple):
    """Tables and biases of a float dtype; tables [rows, …] or functions from row numbers to rows."""

    nodes: Tensor | Lookup  # [2^d - 1, in]
    node_bias: Tensor  # [2^d - 1]
    leaf_in: Tensor | Lookup  # [2^d·width, in]
    in_bias: Tensor  # [2^d, width]
    leaf_out: Tensor | Lookup  # [2^d·width, out]
    out_bias: Tensor  # [2^d, out]

    @property
    def depth(self) -> int:
        """d."""
        return len(self.out_bias).bit_length() - 1

    @property
    def dense(self) -> bool:
        """True if all tables are tensors."""
        return all(isinstance(value, Tensor) for value in self)


def _rows(table: Tensor | Lookup, index: Tensor) -> Tensor:
    return table[index] if isinstance(table, Tensor) else table(index)


def leaves(x: Tensor, tree: Tree) -> Tensor:
    """Return the leaf of each token [tokens, in]: int64 [tokens]."""
    node = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for _ in range(tree.depth):
        score = (x * _rows(tree.nodes, node)).sum(-1) + tree.node_bias[node]
        node = 2 * node + 1 + (score > 0)
    return node.sub(2**tree.depth - 1)


def forward(x: Tensor, tree: Tree, activation: str) -> Tensor:
    """Map [tokens, in] to [tokens, out], each token by its leaf; tokens of one leaf are multiplied together."""
    width = tree.in_bias.shape[1]
    in_order, order = leaves(x, tree).sort(stable=True)
    used, counts = in_order.unique_consecutive(return_counts=True)
    parts = []
    for leaf, tokens in zip(used.tolist(), x[order].split(counts.tolist()), strict=True):
        rows = torch.arange(leaf * width, (leaf + 1) * width, device=x.device)
        hidden = torch.nn.functional.linear(tokens, _rows(tree.leaf_in, rows), tree.in_bias[leaf])
        parts.append(torch.addmm(tree.out_bias[leaf], ACTIVATIONS[activation](hidden), _rows(tree.leaf_out, rows)))
    if not parts:
        return x.new_empty(0, tree.out_bias.shape[1])
    return torch.cat(parts)[order.argsort()]
