"""Which backend runs an operation: an explicit choice works or raises, auto takes the first that can."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal, get_args

import torch

from seedpack.errors import BackendError

Backend = Literal["auto", "reference", "cpu", "triton"]


NOTHING: Mapping[str, str | None] = {}
NATIVE = {"cpu": "cpu", "cuda": "triton"}  # the backend that a device's user expects


@cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interprets() -> bool:
    """Whether Triton runs its kernels in its interpreter, which takes tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _obstacle(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run for tensors on a device, or None."""
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


@cache
def _warn_fallback(op: str, backend: str, reason: str) -> None:
    """Say once that auto passed a backend over for a reason that the user can mend."""
    warnings.warn(f"{op}: backend {backend!r} passed over, {reason}", RuntimeWarning, stacklevel=4)


def choose(
    op: str, backend: Backend, device: torch.device, offered: Sequence[str], unable: Mapping[str, str | None] = NOTHING
) -> str:
    """The backend to run `op` with.

    Args:
        op: the operation's name, for messages.
        backend: what the caller asked for.
        device: where the tensors are.
        offered: the backends that the operation has, best first; "reference" runs everywhere.
        unable: for backends that cannot run these arguments, why.

    Raises:
        BackendError: an explicit choice cannot run.
    """
    if backend not in get_args(Backend):
        raise BackendError(f"{op}: unknown backend {backend!r}; known: {', '.join(get_args(Backend))}")
    if backend != "auto":
        if backend not in offered:
            raise BackendError(f"{op} has no backend {backend!r}; it has: {', '.join(offered)}")
        if (reason := _obstacle(backend, device) or unable.get(backend)) is not None:
            raise BackendError(f"{op}: backend {backend!r} cannot run: {reason}")
        return backend
    for candidate in offered:
        reason = _obstacle(candidate, device) or unable.get(candidate)
        if reason is None:
            return candidate
        if NATIVE.get(device.type) == candidate:
            _warn_fallback(op, candidate, reason)
    raise BackendError(f"{op}: no backend can run on {device}")
