"""Products with a weight that is noise times coefficients, and the gradient to the coefficients; see `reference`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Size, Tensor

from seedpack.errors import CodecError
from seedpack.kernels.basis.decode import basis_dense, basis_reduce
from seedpack.kernels.basis.decode_reference import HADAMARD, require_basis
from seedpack.kernels.dispatch import Backend, choose

BACKENDS = ("cpu", "triton", "reference")


def basis_matmul(
    x: Tensor, coefs: Tensor, *, seed: int, generator: str, rows: int, backend: Backend = "auto"
) -> Tensor:
    """x [tokens, columns] times the weight [rows, columns] transposed, in the dtype of x; coefs [blocks, M]."""
    require_basis(generator, coefs.shape, rows)
    if generator == HADAMARD:  # its transforms make whole pieces of a weight
        return (x.float() @ _hadamard(coefs, seed, rows, x.shape[1], backend).T).to(x.dtype)
    return _kernels(backend, x).matmul(x, coefs, seed, generator, rows)  # type: ignore[no-any-return]


def basis_matmul_transposed(
    grad: Tensor, coefs: Tensor, *, seed: int, generator: str, columns: int, backend: Backend = "auto"
) -> Tensor:
    """grad [tokens, rows] times the weight [rows, columns]: the gradient to x, in the dtype of grad."""
    require_basis(generator, coefs.shape, grad.shape[-1])
    if generator == HADAMARD:
        return (grad.float() @ _hadamard(coefs, seed, grad.shape[1], columns, backend)).to(grad.dtype)
    return _kernels(backend, grad).matmul_transposed(grad, coefs, seed, generator, columns)  # type: ignore[no-any-return]


def basis_grad_coefs(
    grad: Tensor, x: Tensor, *, blocks: int, count: int, seed: int, generator: str, backend: Backend = "auto"
) -> Tensor:
    """The gradient to the coefficients, float32 [blocks, count]; grad [tokens, rows], x [tokens, columns]."""
    require_basis(generator, Size((blocks, count)), grad.shape[-1])
    if len(grad) != len(x):
        raise CodecError(f"basis: gradients of {len(grad)} tokens, activations of {len(x)}: they must be of the same")
    if generator == HADAMARD:
        weight_grad, rows = grad.float().T @ x.float(), grad.shape[1]
        return basis_reduce(
            weight_grad, blocks=blocks, count=count, seed=seed, generator=generator, rows=rows, backend=backend
        )
    return _kernels(backend, x).grad_coefs(grad, x, blocks, count, seed, generator)  # type: ignore[no-any-return]


def _hadamard(coefs: Tensor, seed: int, rows: int, columns: int, backend: Backend) -> Tensor:
    return basis_dense(coefs, seed=seed, generator=HADAMARD, rows=rows, columns=columns, backend=backend)


def _kernels(backend: Backend, x: Tensor) -> Any:
    return import_module(f"seedpack.kernels.basis.matmul_{choose('basis_matmul', backend, x.device, BACKENDS)}")
