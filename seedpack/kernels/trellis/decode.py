"""The integers of a trellis weight: each L-bit window of a row's bit stream is the seed of one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from seedpack.kernels.dispatch import Backend, choose

BACKENDS = ("cpu", "triton", "reference")


def trellis_decode(
    stream: Tensor,
    *,
    code_bits: int,
    state_bits: int,
    key: int,
    columns: int,
    circular: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """int16 [rows, columns], each in ±510; see `reference.decode` for the form of the stream."""
    kernels = _kernels(choose("trellis_decode", backend, stream.device, BACKENDS))
    return kernels.decode(stream, code_bits, state_bits, key, circular, columns)  # type: ignore[no-any-return]


def trellis_dense(
    stream: Tensor,
    scale: Tensor,
    *,
    code_bits: int,
    state_bits: int,
    key: int,
    columns: int,
    circular: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """float32 [rows, columns], each integer times its row's scale (float32 [rows]), rounded once."""
    kernels = _kernels(choose("trellis_dense", backend, stream.device, BACKENDS))
    return kernels.dense(stream, scale, code_bits, state_bits, key, circular, columns)  # type: ignore[no-any-return]


def _kernels(chosen: str) -> Any:
    return import_module(f"seedpack.kernels.trellis.decode_{chosen}")
