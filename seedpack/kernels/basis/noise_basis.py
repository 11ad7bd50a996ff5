"""The pseudorandom bases of a weight, which travel whole from the codec to the kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from seedpack.errors import CodecError
from seedpack.kernels.dispatch import Backend

HADAMARD = "hadamard"  # the generator of structured bases


@dataclass(frozen=True)
class NoiseBasis(ABC):
    """Row r of a weight [rows, columns] is Σ_m coefs[b, m]·(row r of basis m), b the row's block.

    Coefficients are [blocks, M]; each block has ceil(rows / blocks) rows, the last what is left. The products are those of a
    weight that is materialised, unless a subclass has better ones.

    Attributes:
        generator: of the words: "philox", "squirrel5" or "hadamard".
        seed: of the words, 64 bits.
        key: the check of a private key, of which the words come then, or "".
        variance: of a basis's entries.
        takes_key: whether there can be a key.
        fused: whether products generate the bases inside, and no weight is materialised.
    """

    generator: str
    seed: int
    key: str = ""
    variance: ClassVar[float]
    takes_key: ClassVar[bool]
    fused: ClassVar[bool]

    def __post_init__(self) -> None:
        if self.key and not self.takes_key:
            raise CodecError(f"basis: generator {self.generator!r} takes no private key; use {HADAMARD!r}")

    @abstractmethod
    def dense(
        self, coefs: Tensor, rows: int, columns: int, index: Tensor | None = None, backend: Backend = "auto"
    ) -> Tensor:
        """Return the weight, float32 [rows, columns], or its rows `index` (int64 [n]) alone."""

    @abstractmethod
    def dense_cost(self, blocks: int, count: int, rows: int, columns: int) -> int:
        """Return the bytes that `dense` takes, or its work as bytes, as `Codec.decoding_cost` counts them."""

    @abstractmethod
    def reduce(
        self,
        weight_grad: Tensor,
        blocks: int,
        count: int,
        rows: int,
        index: Tensor | None = None,
        backend: Backend = "auto",
    ) -> Tensor:
        """Transpose `dense`: return float32 [blocks, count] from the gradient to the weight [rows, columns], or to the rows
        of `index` [n, columns], among which one may stand more than once."""

    def matmul(self, x: Tensor, coefs: Tensor, rows: int, backend: Backend = "auto") -> Tensor:
        """Multiply x [tokens, columns] by the weight transposed, in the dtype of x."""
        return (x.float() @ self.dense(coefs, rows, x.shape[1], backend=backend).T).to(x.dtype)

    def matmul_transposed(self, grad: Tensor, coefs: Tensor, columns: int, backend: Backend = "auto") -> Tensor:
        """Multiply grad [tokens, rows] by the weight: the gradient to x, in the dtype of grad."""
        return (grad.float() @ self.dense(coefs, grad.shape[1], columns, backend=backend)).to(grad.dtype)

    def grad_coefs(self, grad: Tensor, x: Tensor, blocks: int, count: int, backend: Backend = "auto") -> Tensor:
        """Return the gradient of `matmul` to the coefficients, float32 [blocks, count]."""
        require_same_tokens(grad, x)
        return self.reduce(grad.float().T @ x.float(), blocks, count, grad.shape[1], backend=backend)


def rows_per_block(rows: int, blocks: int) -> int:
    """Return the rows that share coefficients."""
    return -(-rows // blocks)


def require_coefficients(shape: Sequence[int], rows: int) -> None:
    """Refuse coefficients that are not [1 … rows, 1 …].

    Raises:
        CodecError: with their shape and the one that is expected.
    """
    if len(shape) != 2 or not 1 <= shape[0] <= rows or shape[1] < 1:
        raise CodecError(
            f"basis: coefficients of a weight of {rows} rows must be [1 to {rows}, 1 or more], got {list(shape)}"
        )


def require_same_tokens(grad: Tensor, x: Tensor) -> None:
    """Refuse gradients and activations of different counts of tokens."""
    if len(grad) != len(x):
        raise CodecError(f"basis: gradients of {len(grad)} tokens, activations of {len(x)}: they must be of the same")
