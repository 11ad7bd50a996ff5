"""Fast feedforward on the CPU: a token reads the nodes on its way and the rows of its leaf, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import carray, prange, types  # type: ignore[attr-defined]
from numba.extending import intrinsic
from torch import Tensor

from seedpack.kernels.common.jit import jit
from seedpack.kernels.feedforward.reference import ACTIVATIONS, Tree

NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
FEW_VALUES = 1 << 20  # read by all tokens together: below it one thread is done before others have begun
SUMS = {"reassoc", "contract", "nsz"}  # in any order; of the function that a sum is inlined into


@jit(fastmath=SUMS, inline="always")
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@jit(fastmath=SUMS)
def _leaf(x: Any, nodes: Any, node_bias: Any, depth: int) -> int:
    node = 0
    for _ in range(depth):
        node = 2 * node + 1 + (_dot(x, nodes[node]) + node_bias[node] > 0)
    return node - ((1 << depth) - 1)


@jit()
def _activated(value: Any, activation: int) -> Any:
    if activation == 0:
        return max(value, np.float32(0)) if value == value else value
    if activation == 1:
        return np.float32(0.5) * value * np.float32(1 + math.erf(value * np.float32(math.sqrt(0.5))))
    return value / np.float32(1 + math.exp(-value))


@jit(fastmath=SUMS)
def _through(
    x: Any, leaf: int, leaf_in: Any, in_bias: Any, leaf_out: Any, out_bias: Any, activation: int, out: Any
) -> None:
    out[:] = out_bias[leaf]
    for unit in range(in_bias.shape[1]):
        row = leaf * in_bias.shape[1] + unit
        hidden = _activated(_dot(x, leaf_in[row]) + in_bias[leaf, unit], activation)
        for i in range(out.shape[0]):
            out[i] += hidden * leaf_out[row, i]


@intrinsic
def _floats(context: Any, address: Any) -> Any:
    """Make a pointer from an address."""

    def cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), cast


@jit()
def _one_by_one(
    x: int,
    nodes: int,
    node_bias: int,
    leaf_in: int,
    in_bias: int,
    leaf_out: int,
    out_bias: int,
    out: int,
    tokens: int,
    columns: int,
    depth: int,
    width: int,
    outputs: int,
    activation: int,
) -> None:
    """Take tokens one by one, by addresses: to make arrays of so many tensors takes longer than one token's products."""
    leaves, units = 1 << depth, width << depth
    x_, out_ = carray(_floats(x), (tokens, columns)), carray(_floats(out), (tokens, outputs))  # type: ignore[call-arg]
    nodes_, node_bias_ = carray(_floats(nodes), (leaves, columns)), carray(_floats(node_bias), leaves)
    leaf_in_, in_bias_ = carray(_floats(leaf_in), (units, columns)), carray(_floats(in_bias), (leaves, width))
    leaf_out_, out_bias_ = carray(_floats(leaf_out), (units, outputs)), carray(_floats(out_bias), (leaves, outputs))
    for t in range(tokens):
        leaf = _leaf(x_[t], nodes_, node_bias_, depth)
        _through(x_[t], leaf, leaf_in_, in_bias_, leaf_out_, out_bias_, activation, out_[t])


@jit(parallel=True)
def _all_leaves(x: Any, nodes: Any, node_bias: Any, depth: int, leaves: Any) -> None:
    for t in prange(x.shape[0]):
        leaves[t] = _leaf(x[t], nodes, node_bias, depth)


@jit(parallel=True)
def _in_order(
    x: Any, order: Any, leaves: Any, leaf_in: Any, in_bias: Any, leaf_out: Any, out_bias: Any, activation: int, out: Any
) -> None:
    for i in prange(x.shape[0]):
        t = order[i]
        _through(x[t], leaves[t], leaf_in, in_bias, leaf_out, out_bias, activation, out[t])


def forward(x: Tensor, tree: Tree, activation: str) -> Tensor:
    """Do as `reference.forward`, summed in another order; float32. Many tokens go leaf by leaf, so that rows stay in cache."""
    values: list[Any] = [value if value.is_contiguous() else value.contiguous() for value in (x, *tree)]  # type: ignore[union-attr]
    tokens, columns = x.shape
    width, outputs = tree.in_bias.shape[1], tree.out_bias.shape[1]
    out = torch.empty(tokens, outputs, dtype=torch.float32)
    depth, number = tree.depth, NUMBERS[activation]
    if tokens * (depth * columns + width * (columns + outputs)) < FEW_VALUES:
        addresses: Any = [value.data_ptr() for value in (*values, out)]
        _one_by_one(*addresses, tokens, columns, depth, width, outputs, number)  # type: ignore[call-arg]
        return out
    rows, nodes, node_bias, *leaf_tables = [value.detach().numpy() for value in values]
    leaves = np.empty(tokens, np.int64)
    _all_leaves(rows, nodes, node_bias, depth, leaves)
    _in_order(rows, np.argsort(leaves, kind="stable"), leaves, *leaf_tables, number, out.numpy())  # type: ignore[call-arg]
    return out
