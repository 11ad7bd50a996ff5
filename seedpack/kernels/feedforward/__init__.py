"""Multiply tokens by one leaf each of a tree; see `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack._shapes import require_columns
from seedpack.errors import BackendError
from seedpack.kernels.dispatch import NO_REASONS, Backend, kernels_for
from seedpack.kernels.feedforward import reference
from seedpack.kernels.feedforward.reference import ACTIVATIONS as ACTIVATIONS
from seedpack.kernels.feedforward.reference import Tree as Tree
from seedpack.kernels.feedforward.reference import leaves as leaves

PLAIN = (Tensor, torch.nn.Parameter)  # others may have no address


def fast_feedforward(x: Tensor, tree: Tree, activation: str, backend: Backend = "auto") -> Tensor:
    """Map x [..., in] to [..., out] in the dtype of x; where a gradient is wanted or a table is a function, by the reference.

    Raises:
        ModelError: x has another width than the tables.
        BackendError: an explicit choice cannot run.
    """
    for table in (tree.nodes, tree.leaf_in):
        if isinstance(table, Tensor):
            require_columns("fast feedforward", x, table.shape[1])
    tokens = x.reshape(-1, x.shape[-1])
    dense, tensors = tree.dense, [value for value in tree if isinstance(value, Tensor)]
    graded = torch.is_grad_enabled() and any(value.requires_grad for value in (x, *tensors))
    if backend == "reference" or (backend == "auto" and (graded or not dense)):
        y = reference.forward(tokens, tree, activation)
    elif not dense:
        raise BackendError(f"feedforward: backend {backend!r} cannot run: a table is a function, as a packed one is")
    else:
        y = (_operator if torch.compiler.is_compiling() else _forward)(tokens, tensors, activation, backend)
    return y.view(*x.shape[:-1], y.shape[-1])


def _forward(x: Tensor, tensors: list[Tensor], activation: str, backend: str) -> Tensor:
    plain = all([value.dtype == torch.float32 and type(value) in PLAIN for value in (x, *tensors)])
    unable = NO_REASONS if plain else {"cpu": "it takes plain float32 tensors alone"}
    kernels = kernels_for("feedforward", backend, x.device, unable)  # type: ignore[arg-type]
    return kernels.forward(x, Tree(*tensors), activation)


# Opaque to the compiler; a call through it costs 20 µs.
_operator = torch.library.custom_op("seedpack::fast_feedforward", _forward, mutates_args=())


@_operator.register_fake
def _(x: Tensor, tensors: list[Tensor], activation: str, backend: str) -> Tensor:
    return x.new_empty(len(x), tensors[-1].shape[1])
