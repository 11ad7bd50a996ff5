"""Fitting one tensor of a plan on a device, and what is reported of it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from seedpack.codecs.base import Codec
from seedpack.codecs.importance import Importance
from seedpack.codecs.interfaces import HessianFitting, RowScaling
from seedpack.converter.plan import Plan, TensorPlan
from seedpack.converter.sources.base import Source
from seedpack.dtypes import TORCH_DTYPES
from seedpack.errors import CodecError, ModelError, NonfiniteError
from seedpack.kernels.dispatch import Backend


class Found(Protocol):
    """Hessians by the names of parameters."""

    def __contains__(self, name: object, /) -> bool: ...

    def get(self, name: str, /) -> Tensor | None:
        """The Hessian of a weight's input [in, in]."""
        ...


class Journal(Protocol):
    """Where fitted tensors are kept until all are."""

    def get(self, tensor: TensorPlan, /) -> tuple[dict[str, Tensor], TensorReport] | None:
        """A tensor's parts and report, if it was fitted before."""
        ...

    def put(self, parts: Mapping[str, Tensor], report: TensorReport, /) -> None:
        """Keep them."""
        ...


Watch = Callable[[str, int], None]
WEIGHTS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class TensorReport:
    """One fitted tensor: ‖W - Ŵ‖² and ‖W‖² (float64), and the seconds its fit took."""

    plan: TensorPlan
    error: float
    energy: float
    seconds: float

    @property
    def error_db(self) -> float:
        """10·log10(‖W - Ŵ‖² / ‖W‖²)."""
        return decibels(self.error, self.energy)


@dataclass(frozen=True)
class Report:
    """What `compress` did."""

    path: Path
    plan: Plan
    tensors: tuple[TensorReport, ...]
    file_bytes: int
    seconds: float

    @property
    def error_db(self) -> float:
        """Relative error over all packed weights, in dB."""
        return decibels(sum(t.error for t in self.tensors), sum(t.energy for t in self.tensors))

    def to_json(self) -> dict[str, Any]:
        """A document for machines."""
        return {
            "path": str(self.path),
            "seconds": self.seconds,
            "file_bytes": self.file_bytes,
            "error_db": self.error_db,
            **self.plan.totals(),
            "tensors_packed": {
                t.plan.name: {
                    "codec": t.plan.codec.spec().to_json(),
                    "shape": list(t.plan.shape),
                    "bits_per_weight": t.plan.bits_per_weight,
                    "error_db": t.error_db,
                    "seconds": t.seconds,
                }
                for t in self.tensors
            },
        }


def decibels(error: float, energy: float) -> float:
    """10·log10(error / energy); -inf for no error, inf where it has no bound.

    >>> decibels(1.0, 100.0)
    -20.0
    """
    if error == 0:
        return -math.inf
    return 10 * math.log10(error / energy) if 0 < energy < math.inf and error < math.inf else math.inf


def fitting_device(device: str | torch.device) -> torch.device:
    """The device to fit on: "cpu", "cuda", "cuda:1".

    Raises:
        ModelError: it is unknown, or not here.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise ModelError(f"device {str(device)!r}: fitting runs on cpu, cuda, or cuda:N")
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if (found.index or 0) >= count:
        raise ModelError(
            f"device {str(device)!r}: torch sees {count} CUDA devices here; choose another, leave --device out to fit on "
            "the CPU, or install torch with CUDA"
        )
    return found


def leave_nonfinite(source: Source, plan: Plan, allow: bool) -> Plan:
    """Look at every tensor to be packed before the first is fitted."""
    bad = [t.name for t in plan.tensors if t.packed and not _usable(source.read(t.name))]
    if bad and not allow:
        raise NonfiniteError(
            f"{source.name}: {len(bad)} tensors hold NaN or Inf (or more than 1e33): {', '.join(bad[:4])}{' …' if len(bad) > 4 else ''}; "
            "mend the model, or pass --allow-nonfinite (allow_nonfinite=True) to store them raw"
        )
    return plan.raw(bad, "holds NaN or Inf") if bad else plan


def _usable(weight: Tensor) -> bool:
    """Whether every value is finite and small enough for float32 arithmetic; looked at in pieces."""
    return all(bool((piece.float().abs() < 1e33).all()) for piece in weight.flatten().split(WEIGHTS_AT_ONCE))


class Inputs:
    """What is known of the inputs of layers, by the names of a source's tensors.

    Args:
        source: the model.
        given: by tensor name, the importance of each channel [in], or the Hessian [in, in]; it wins.
        found: by the model's parameter, the Hessian [in, in].
    """

    def __init__(self, source: Source, given: Mapping[str, Tensor], found: Found):
        self._source, self._given, self._found = source, given, found

    def hessians(self, plan: Plan) -> set[str]:
        """The names of a plan's tensors that there is a Hessian for."""
        names = {tensor.name for tensor in plan.tensors}
        given = {name for name in names & self._given.keys() if Importance.of(self._given[name]).has_hessian}
        return given | {name for name in names - self._given.keys() if self._parameter(name) is not None}

    def importance(self, name: str) -> Tensor | None:
        """[in], [in, in], or None."""
        if name in self._given:
            return self._given[name]
        parameter = self._parameter(name)
        return None if parameter is None else self._found.get(parameter)

    def _parameter(self, name: str) -> str | None:
        return next((p for p in self._source.parameters(name) if p in self._found), None)


def fit(
    source: Source,
    tensor: TensorPlan,
    inputs: Inputs,
    device: torch.device,
    backend: Backend,
    watch: Watch | None,
    journal: Journal | None = None,
) -> tuple[dict[str, Tensor], TensorReport]:
    """The parts of one tensor, on the device or from the journal, and what is said of it; raw tensors are left where they
    are."""
    started = time.perf_counter()
    if not tensor.packed:
        return tensor.codec.encode(source.read(tensor.name)), TensorReport(tensor, 0.0, 0.0, 0.0)
    if journal is not None and (known := journal.get(tensor)) is not None:
        if watch:
            watch(tensor.name, math.prod(tensor.shape))
        return known
    matrix = matrix_of(source, tensor).to(device).float()
    progress = (lambda count: watch(tensor.name, count)) if watch else None
    importance = Importance.of(inputs.importance(tensor.name))
    if not isinstance(tensor.codec, HessianFitting):
        importance = importance.per_channel()
    if importance.is_none and tensor.codec.uses_norm_heuristic and (power := source.power(tensor.name)) is not None:
        importance = Importance.from_norms(matrix, power)
    importance = importance.zero_as_none()
    try:
        parts = tensor.codec.encode(matrix, importance, progress=progress, backend=backend)
    except CodecError as refused:
        raise CodecError(f"{tensor.name}: {refused}") from None
    except torch.linalg.LinAlgError as failed:  # type: ignore[attr-defined]
        raise ModelError(f"{tensor.name}: its Hessian is not positive definite ({failed})") from None
    error, energy = _error(tensor.codec, parts, matrix)
    report = TensorReport(tensor, error, energy, time.perf_counter() - started)
    if journal is not None:
        journal.put(parts, report)
    return parts, report


def retold(
    source: Source,
    tensor: TensorPlan,
    parts: dict[str, Tensor],
    report: TensorReport,
    factors: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], TensorReport]:
    """A tensor's parts and report after tuning: with the factors of its rows by its name, or its value by its parameter."""
    if tensor.name in factors:
        assert isinstance(tensor.codec, RowScaling)
        changed = tensor.codec.rescaled(parts, factors[tensor.name].to(parts["weight"].device))
        error, energy = _error(tensor.codec, changed, matrix_of(source, tensor).to(parts["weight"].device).float())
        return changed, dataclasses.replace(report, error=error, energy=energy)
    value = next((values[p] for p in source.parameters(tensor.name) if p in values), None)
    if value is None:
        return parts, report
    return tensor.codec.encode(value.cpu().to(TORCH_DTYPES[tensor.dtype])), report


def matrix_of(source: Source, tensor: TensorPlan) -> Tensor:
    """A tensor as its codec sees it [out, in]."""
    weight = source.read(tensor.name)
    return (weight.mT if tensor.transposed else weight).reshape(tensor.codec_shape)


def _error(codec: Codec, parts: dict[str, Tensor], matrix: Tensor) -> tuple[float, float]:
    """‖W - Ŵ‖² and ‖W‖², some rows at a time."""
    error = energy = 0.0
    step = max(1, WEIGHTS_AT_ONCE // matrix.shape[1])
    for index in torch.arange(len(matrix)).split(step):
        rows = matrix[index].double()
        decoded = codec.decode_rows(parts, index, tuple(matrix.shape), torch.float32)
        error += float((rows - decoded).square().sum())
        energy += float(rows.square().sum())
    return error, energy
