"""Choose the backend of an operation: an explicit choice works or raises, auto takes the first backend that can run.

An operation is named by its place: "trellis.decode" is in `kernels/trellis/decode_<backend>.py`, "rotation" in
`kernels/rotation/<backend>.py`. What these modules need is imported on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Literal, Protocol, get_args

import torch

from seedpack.errors import BackendError

Backend = Literal["auto", "reference", "cpu", "triton"]
NAMES = get_args(Backend)
BACKENDS = ("cpu", "triton", "reference")  # best first; the reference runs everywhere
NO_REASONS: Mapping[str, str | None] = {}
NATIVE = {"cpu": "cpu", "cuda": "triton"}  # the backend that a device's user expects


class Kernels(Protocol):
    """A backend's module of an operation."""

    def __getattr__(self, name: str) -> Callable[..., torch.Tensor]: ...


@cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interprets() -> bool:
    """Return whether Triton runs its kernels in its interpreter, which takes tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _obstacle(backend: str, device: torch.device) -> str | None:
    """Say why a backend cannot run for tensors on a device, or return None."""
    if backend == "cpu":
        if device.type != "cpu":
            return f"it runs on the CPU, the tensors are on {device}"
        if not _has_numba():
            return "Numba is not installed (pip install numba)"
    if backend == "triton":
        if not _has_triton():
            return "Triton is not installed (pip install triton)"
        if device.type != "cuda" and not (device.type == "cpu" and _interprets()):
            return f"it runs on GPUs, the tensors are on {device}"
    return None


def can_run(backend: str, device: torch.device) -> bool:
    """Return whether a backend can run for tensors on a device."""
    return _obstacle(backend, device) is None


@cache
def _warn_fallback(op: str, backend: str, reason: str) -> None:
    """Say once that auto passed over the backend that the device's user expects."""
    warnings.warn(f"{op}: backend {backend!r} passed over, {reason}", RuntimeWarning, stacklevel=4)


@cache
def _module(op: str, backend: str) -> Kernels:
    separator = "_" if "." in op else "."
    return importlib.import_module(f"seedpack.kernels.{op}{separator}{backend}")


def kernels_for(
    op: str,
    backend: Backend,
    device: torch.device,
    unable: Mapping[str, str | None] = NO_REASONS,
    among: Sequence[str] = BACKENDS,
) -> Kernels:
    """Return the module that runs `op`.

    Args:
        op: the operation, by its place.
        backend: what the caller asks for.
        device: where the tensors are.
        unable: for backends that cannot run these arguments, why.
        among: the backends that the operation has, best first.

    Raises:
        BackendError: an explicit choice cannot run.
    """
    if backend not in NAMES:
        raise BackendError(f"{op}: unknown backend {backend!r}; known: {', '.join(NAMES)}")
    if backend != "auto":
        if backend not in among:
            raise BackendError(f"{op} has no backend {backend!r}; it has: {', '.join(among)}")
        if (reason := _obstacle(backend, device) or unable.get(backend)) is not None:
            raise BackendError(f"{op}: backend {backend!r} cannot run: {reason}")
        return _module(op, backend)
    for candidate in among:
        reason = _obstacle(candidate, device) or unable.get(candidate)
        if reason is None:
            return _module(op, candidate)
        if NATIVE.get(device.type) == candidate:
            _warn_fallback(op, candidate, reason)
    raise BackendError(f"{op}: no backend can run on {device}")
