"""Rebuild a weight that is pseudorandom bases times coefficients, and its transpose; see `reference`, and `hadamard_basis`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Size, Tensor

from seedpack.kernels.basis import hadamard as hadamard_basis
from seedpack.kernels.basis.decode_reference import HADAMARD, require_basis, rows_per_block
from seedpack.kernels.dispatch import Backend, choose

BACKENDS = ("cpu", "triton", "reference")
OF_SOME_ROWS = ("cpu", "reference")  # backends that make some rows alone
FOLD = 4096  # columns of a weight of one block for the kernels, which share out rows


def basis_dense(
    coefs: Tensor, *, seed: int, generator: str, rows: int, columns: int, key: str = "", index: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """float32 [rows, columns] from coefficients [blocks, M]; see `reference.dense`, and `hadamard_basis`.

    Args:
        coefs: float.
        seed: of the bases.
        generator: "philox", "squirrel5" or "hadamard".
        rows: of the weight; each block has ceil(rows / blocks) of them.
        columns: of the weight.
        key: the check of a private key, of which the words come then; for "hadamard" alone.
        index: int64 [n], the rows to make; None is all.
        backend: which kernels.
    """
    require_basis(generator, coefs.shape, rows, key)
    if generator == HADAMARD:
        size = rows_per_block(rows, len(coefs)) * columns
        whole = hadamard_basis.expand(coefs, size, seed, key, backend).view(-1, columns)[:rows]
        return whole if index is None else whole[index]
    kernels = _kernels(backend, coefs, index)
    if index is None and len(coefs) == 1 and columns > FOLD:
        folded = -(-rows * columns // FOLD)
        weight: Tensor = kernels.dense(coefs, seed, generator, folded, FOLD, _every(coefs, folded))
        return weight.view(-1)[: rows * columns].view(rows, columns)
    return kernels.dense(coefs, seed, generator, rows, columns, _every(coefs, rows) if index is None else index)  # type: ignore[no-any-return]


def basis_reduce(
    weight_grad: Tensor, *, blocks: int, count: int, seed: int, generator: str, rows: int, key: str = "",
    index: Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """The transpose of `basis_dense`: float32 [blocks, count] from the gradient to the weight [rows, columns], or to the
    rows of `index` [n, columns], among which one may stand more than once."""
    columns = weight_grad.shape[1]
    require_basis(generator, Size((blocks, count)), rows, key)
    if generator == HADAMARD:
        whole_rows = blocks * rows_per_block(rows, blocks)
        if index is None:
            whole = torch.nn.functional.pad(weight_grad, (0, 0, 0, whole_rows - rows))
        else:
            whole = weight_grad.new_zeros(whole_rows, columns).index_add_(0, index, weight_grad)
        return hadamard_basis.reduce(whole.reshape(blocks, -1), count, seed, key, backend)
    kernels = _kernels(backend, weight_grad, index)
    if index is None and blocks == 1 and columns > FOLD:
        rows = -(-rows * columns // FOLD)
        weight_grad = torch.nn.functional.pad(weight_grad.flatten(), (0, rows * FOLD - weight_grad.numel())).view(
            -1, FOLD
        )
    index = _every(weight_grad, rows) if index is None else index
    return kernels.reduce(weight_grad, blocks, count, seed, generator, rows, index)  # type: ignore[no-any-return]


def _every(given: Tensor, rows: int) -> Tensor:
    return torch.arange(rows, device=given.device)


def _kernels(backend: Backend, given: Tensor, index: Tensor | None) -> Any:
    chosen = choose("basis_dense", backend, given.device, BACKENDS if index is None else OF_SOME_ROWS)
    return import_module(f"seedpack.kernels.basis.decode_{chosen}")
