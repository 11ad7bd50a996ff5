"""The integers of a trellis weight: each L-bit window of a row's circular bit stream is the seed of one."""

from __future__ import annotations

from torch import Tensor

from seedpack.kernels.dispatch import Backend, choose
from seedpack.kernels.trellis_decode import reference

BACKENDS = ("cpu", "reference")


def trellis_decode(
    stream: Tensor, *, code_bits: int, state_bits: int, key: int, columns: int, backend: Backend = "auto"
) -> Tensor:
    """int16 [rows, columns], each in ±510; see `reference.decode` for the form of the stream."""
    if choose("trellis_decode", backend, stream.device, BACKENDS) == "cpu":
        from seedpack.kernels.trellis_decode import cpu

        return cpu.decode(stream, code_bits, state_bits, key, columns)
    return reference.decode(stream, code_bits, state_bits, key, columns)


def trellis_dense(
    stream: Tensor, scale: Tensor, *, code_bits: int, state_bits: int, key: int, columns: int, backend: Backend = "auto"
) -> Tensor:
    """float32 [rows, columns], each integer times its row's scale (float32 [rows]), rounded once."""
    if choose("trellis_dense", backend, stream.device, BACKENDS) == "cpu":
        from seedpack.kernels.trellis_decode import cpu

        return cpu.dense(stream, scale, code_bits, state_bits, key, columns)
    return reference.dense(stream, scale, code_bits, state_bits, key, columns)
