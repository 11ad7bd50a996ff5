"""Fast feedforward on the CPU: a token reads the nodes on its way and the rows of its leaf, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from seedpack.kernels.fast_feedforward.reference import ACTIVATIONS, Tree

NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
FEW_VALUES = 1 << 20  # read by all tokens together: below it one thread is done before others have begun


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, inline="always")
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@njit(cache=True, nogil=True)
def _leaf(x: Any, nodes: Any, node_bias: Any, depth: int) -> int:
    node = 0
    for _ in range(depth):
        node = 2 * node + 1 + (_dot(x, nodes[node]) + node_bias[node] > 0)
    return node - ((1 << depth) - 1)


@njit(cache=True, nogil=True)
def _activated(value: Any, activation: int) -> Any:
    if activation == 0:
        return max(value, np.float32(0)) if value == value else value
    if activation == 1:
        return np.float32(0.5) * value * np.float32(1 + math.erf(value * np.float32(math.sqrt(0.5))))
    return value / np.float32(1 + math.exp(-value))


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _through(
    x: Any, leaf: int, leaf_in: Any, in_bias: Any, leaf_out: Any, out_bias: Any, activation: int, out: Any
) -> None:
    out[:] = out_bias[leaf]
    for unit in range(in_bias.shape[1]):
        row = leaf * in_bias.shape[1] + unit
        hidden = _activated(_dot(x, leaf_in[row]) + in_bias[leaf, unit], activation)
        for i in range(out.shape[0]):
            out[i] += hidden * leaf_out[row, i]


@njit(cache=True, nogil=True)
def _one_by_one(
    x: Any, nodes: Any, node_bias: Any, leaf_in: Any, in_bias: Any, leaf_out: Any, out_bias: Any, depth: int,
    activation: int, out: Any,
) -> None:  # fmt: skip
    for t in range(x.shape[0]):
        leaf = _leaf(x[t], nodes, node_bias, depth)
        _through(x[t], leaf, leaf_in, in_bias, leaf_out, out_bias, activation, out[t])


@njit(parallel=True, cache=True, nogil=True)
def _all_leaves(x: Any, nodes: Any, node_bias: Any, depth: int, leaves: Any) -> None:
    for t in prange(x.shape[0]):
        leaves[t] = _leaf(x[t], nodes, node_bias, depth)


@njit(parallel=True, cache=True, nogil=True)
def _in_order(
    x: Any, order: Any, leaves: Any, leaf_in: Any, in_bias: Any, leaf_out: Any, out_bias: Any, activation: int, out: Any
) -> None:
    for i in prange(x.shape[0]):
        t = order[i]
        _through(x[t], leaves[t], leaf_in, in_bias, leaf_out, out_bias, activation, out[t])


def forward(x: Tensor, tree: Tree, activation: str) -> Tensor:
    """As `reference.forward`, summed in another order; float32. Many tokens go leaf by leaf, so that rows stay in cache."""
    nodes, node_bias, leaf_in, in_bias, leaf_out, out_bias = (value.detach().contiguous().numpy() for value in tree)  # type: ignore[union-attr]
    given, number = x.detach().contiguous().numpy(), NUMBERS[activation]
    out = torch.empty(len(x), out_bias.shape[1])
    read = len(x) * (tree.depth * x.shape[1] + in_bias.shape[1] * (x.shape[1] + out.shape[1]))
    if read < FEW_VALUES:
        _one_by_one(given, nodes, node_bias, leaf_in, in_bias, leaf_out, out_bias, tree.depth, number, out.numpy())
        return out
    leaves = np.empty(len(given), np.int64)
    _all_leaves(given, nodes, node_bias, tree.depth, leaves)
    order = np.argsort(leaves, kind="stable")
    _in_order(given, order, leaves, leaf_in, in_bias, leaf_out, out_bias, number, out.numpy())
    return out
