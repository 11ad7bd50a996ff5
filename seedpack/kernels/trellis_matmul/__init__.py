"""Products with a trellis weight in its rotated basis, straight from its stream; see `reference`."""

from __future__ import annotations

from torch import Tensor

from seedpack.kernels import tiles
from seedpack.kernels.dispatch import Backend, choose
from seedpack.kernels.trellis_decode import trellis_dense
from seedpack.kernels.trellis_matmul import reference

BACKENDS = ("cpu", "reference")
FEW_TOKENS = 8  # up to so many the weights are regenerated inside the product, beyond it tile by tile


def trellis_matmul(
    x: Tensor, stream: Tensor, scale: Tensor, *, code_bits: int, state_bits: int, key: int, backend: Backend = "auto"
) -> Tensor:
    """x [tokens, columns] times the weight [rows, columns] transposed, in the dtype of x.

    Args:
        x: activations in the rotated basis.
        stream: the weight's, as for `trellis_decode`.
        scale: float32 [rows], of the integers.
        code_bits: k.
        state_bits: L.
        key: c.
        backend: which kernels to use.
    """
    if choose("trellis_matmul", backend, x.device, BACKENDS) == "cpu":
        if x.shape[0] <= FEW_TOKENS:
            from seedpack.kernels.trellis_matmul import cpu

            return cpu.matmul(x, stream, scale, code_bits, state_bits, key)
        return tiles.matmul(x, len(scale), _tiles(stream, scale, code_bits, state_bits, key, x.shape[1]))
    return reference.matmul(x, stream, scale, code_bits, state_bits, key)


def trellis_matmul_transposed(
    grad: Tensor, stream: Tensor, scale: Tensor, *, code_bits: int, state_bits: int, key: int, columns: int,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """grad [tokens, rows] times the weight [rows, columns]: the gradient to x, in the rotated basis."""
    if choose("trellis_matmul", backend, grad.device, BACKENDS) == "cpu":
        return tiles.matmul_transposed(grad, columns, _tiles(stream, scale, code_bits, state_bits, key, columns))
    return reference.matmul_transposed(grad, stream, scale, code_bits, state_bits, key, columns)


def _tiles(stream: Tensor, scale: Tensor, code_bits: int, state_bits: int, key: int, columns: int) -> tiles.Tile:
    return lambda rows: trellis_dense(
        stream[rows], scale[rows], code_bits=code_bits, state_bits=state_bits, key=key, columns=columns, backend="cpu"
    )
