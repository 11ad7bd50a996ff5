"""Rebuild a trellis weight: each L-bit window of a row's bit stream is the seed of one integer."""

from __future__ import annotations

from torch import Tensor

from seedpack.kernels.dispatch import Backend, kernels_for
from seedpack.kernels.trellis.code import TrellisCode


def trellis_decode(stream: Tensor, code: TrellisCode, *, columns: int, backend: Backend = "auto") -> Tensor:
    """Return int16 [rows, columns], see `decode_reference.decode` for the form of the stream."""
    return kernels_for("trellis.decode", backend, stream.device).decode(stream, code, columns)


def trellis_dense(
    stream: Tensor, scale: Tensor, code: TrellisCode, *, columns: int, backend: Backend = "auto"
) -> Tensor:
    """Return float32 [rows, columns], each integer times its row's scale (float32 [rows]), rounded once."""
    return kernels_for("trellis.decode", backend, stream.device).dense(stream, scale, code, columns)
