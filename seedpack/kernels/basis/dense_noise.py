"""Bases of dense noise: a word per weight and basis, regenerated inside the products; see `decode_reference`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from seedpack.kernels.basis.noise_basis import NoiseBasis, require_coefficients, require_same_tokens
from seedpack.kernels.dispatch import BACKENDS, Backend, kernels_for

SOME_ROWS = ("cpu", "reference")  # backends that make some rows alone
FOLD = 4096  # columns of a weight of one block for the kernels, which share out rows


class DenseNoise(NoiseBasis):
    """Noise that is uniform in [-1, 1), of Philox or of SquirrelNoise5 (RANDUMB's)."""

    variance: ClassVar[float] = 1 / 3
    takes_key: ClassVar[bool] = False
    fused: ClassVar[bool] = True

    @property
    def philox(self) -> bool:
        """True if the words are Philox's."""
        return self.generator == "philox"

    def dense(
        self, coefs: Tensor, rows: int, columns: int, index: Tensor | None = None, backend: Backend = "auto"
    ) -> Tensor:
        """Generate the noise and sum it."""
        require_coefficients(coefs.shape, rows)
        among = BACKENDS if index is None else SOME_ROWS
        kernels = kernels_for("basis.decode", backend, coefs.device, among=among)
        if index is None and len(coefs) == 1 and columns > FOLD:
            folded = -(-rows * columns // FOLD)
            weight = kernels.dense(coefs, self, folded, FOLD, _every(coefs, folded))
            return weight.view(-1)[: rows * columns].view(rows, columns)
        return kernels.dense(coefs, self, rows, columns, _every(coefs, rows) if index is None else index)

    def dense_cost(self, blocks: int, count: int, rows: int, columns: int) -> int:
        """Return two copies of the weight, or the work: a word per weight and vector, 20 of which take as long as a byte."""
        return rows * columns * max(8, 4 + count // 20)

    def reduce(
        self,
        weight_grad: Tensor,
        blocks: int,
        count: int,
        rows: int,
        index: Tensor | None = None,
        backend: Backend = "auto",
    ) -> Tensor:
        """Generate the noise and sum its products with the gradient."""
        require_coefficients((blocks, count), rows)
        among = BACKENDS if index is None else SOME_ROWS
        kernels = kernels_for("basis.matmul", backend, weight_grad.device, among=among)
        if index is None and blocks == 1 and weight_grad.shape[1] > FOLD:
            rows = -(-weight_grad.numel() // FOLD)
            padding = (0, rows * FOLD - weight_grad.numel())
            weight_grad = torch.nn.functional.pad(weight_grad.flatten(), padding).view(-1, FOLD)
        index = _every(weight_grad, rows) if index is None else index
        return kernels.reduce(weight_grad, blocks, count, self, rows, index)

    def matmul(self, x: Tensor, coefs: Tensor, rows: int, backend: Backend = "auto") -> Tensor:
        """Generate the noise inside the product."""
        require_coefficients(coefs.shape, rows)
        return kernels_for("basis.matmul", backend, x.device).matmul(x, coefs, self, rows)

    def matmul_transposed(self, grad: Tensor, coefs: Tensor, columns: int, backend: Backend = "auto") -> Tensor:
        """Generate the noise inside the product."""
        require_coefficients(coefs.shape, grad.shape[-1])
        return kernels_for("basis.matmul", backend, grad.device).matmul_transposed(grad, coefs, self, columns)

    def grad_coefs(self, grad: Tensor, x: Tensor, blocks: int, count: int, backend: Backend = "auto") -> Tensor:
        """Generate the noise beside the weight's gradient, of which only a tile is ever in memory."""
        require_coefficients((blocks, count), grad.shape[-1])
        require_same_tokens(grad, x)
        return kernels_for("basis.matmul", backend, x.device).grad_coefs(grad, x, blocks, count, self)


def _every(like: Tensor, rows: int) -> Tensor:
    return torch.arange(rows, device=like.device)
