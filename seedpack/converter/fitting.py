"""Fitting one tensor of a plan on a device."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from seedpack.codecs.importance import Importance
from seedpack.codecs.interfaces import HessianFitting, RowScaling
from seedpack.converter.plan import Plan, TensorPlan
from seedpack.converter.report import TensorReport
from seedpack.converter.run import Run
from seedpack.converter.sources.base import Source
from seedpack.converter.statistics import Statistics
from seedpack.dtypes import TORCH_DTYPES
from seedpack.errors import CodecError, ModelError, NonfiniteError
from seedpack.units import count

WEIGHTS_AT_ONCE = 1 << 20
NONFINITE, TABLE = "holds NaN or Inf", "by its values no weight (a mask or a table)"
Parts = dict[str, Tensor]


def raw_by_value(run: Run, plan: Plan, *, guesses: bool) -> dict[str, str]:
    """Look at every tensor to be packed before the first is fitted; return those that have to stay raw, with the reason.

    Args:
        run: the run.
        plan: its plan.
        guesses: leave raw what was guessed to be a weight, and by its values is none: a quarter of it or more is zero, or
            some of it is not finite.

    Raises:
        NonfiniteError: others hold NaN or Inf, and the options do not allow them.
    """
    known = run.journal.checked if run.journal is not None else {}
    tensors = [tensor for tensor in plan.tensors if tensor.packed and (run.fits(tensor) or tensor.name in known)]
    looked = {tensor.name: known[tensor.name] for tensor in tensors if tensor.name in known}
    looks = run.workers.look if run.workers is not None else partial(look_at, run.source)
    for tensor, note in looks(tensor for tensor in tensors if tensor.name not in known):
        run.progress("Checking values", math.prod(tensor.shape), plan.packed_weights, "weights", tensor.name)
        looked[tensor.name] = note
    kinds = {tensor.name: tensor.kind for tensor in plan.tensors}
    found = {
        name: TABLE if guesses and kinds[name] == "guess" else note
        for name, note in looked.items()
        if note == NONFINITE or (note == TABLE and guesses and kinds[name] == "guess")
    }
    bad = [name for name, note in found.items() if note == NONFINITE]
    if bad and not run.options.allow_nonfinite:
        raise NonfiniteError(
            f"{run.source.name}: NaN or Inf (or more than 1e33) in {count(len(bad), 'tensor')}: {', '.join(bad[:4])}"
            f"{' …' if len(bad) > 4 else ''}; correct the model, or pass --allow-nonfinite (allow_nonfinite=True) to store "
            "them raw"
        )
    if run.journal is not None:
        run.journal.add_checked({name: note for name, note in looked.items() if name not in known})
    return found


def look_at(source: Source, tensors: Iterable[TensorPlan]) -> Iterator[tuple[TensorPlan, str]]:
    """Look at the values of tensors, one after the other; see `look`."""
    for tensor in tensors:
        yield tensor, look(source.read(tensor.name))


def look(value: Tensor) -> str:
    """Return why a tensor's values are not those of a weight, or ""."""
    if not is_usable(value):
        return NONFINITE
    return TABLE if 4 * int(torch.count_nonzero(value)) <= 3 * value.numel() else ""


def is_usable(weight: Tensor) -> bool:
    """Return whether every value is finite and small enough for float32 arithmetic; looked at in pieces."""
    return all(bool((piece.float().abs() < 1e33).all()) for piece in weight.flatten().split(WEIGHTS_AT_ONCE))


def fit_all(run: Run, plan: Plan, statistics: Statistics) -> None:
    """Say what runs before have done, and where there are workers, have them fit the rest."""
    assert run.journal is not None
    packed = [tensor for tensor in plan.tensors if tensor.packed]
    done = len(packed) - len(run.journal.missing(packed, statistics.importance, before=True))
    run.resuming(done, f"{len(packed)} tensors done")
    if run.workers is not None:
        run.workers.finish(run, run.journal.missing(packed, statistics.importance), statistics)


def fit(run: Run, tensor: TensorPlan, statistics: Statistics) -> tuple[Parts, TensorReport]:
    """Return the parts of one tensor, fitted on the device or from the journal, and its report; raw tensors stay on the
    CPU."""
    started = time.perf_counter()
    if not tensor.packed:
        value = run.source.read(tensor.name)
        if value.is_floating_point() and TORCH_DTYPES[tensor.dtype] != value.dtype and value.numel():
            _require_fits(tensor, max(map(_largest, value.flatten().split(WEIGHTS_AT_ONCE))))
        return tensor.codec.encode(value), TensorReport(tensor, 0.0, 0.0, 0.0)

    def progress(done: int) -> None:
        run.progress("Fitting", done, run.weights, "weights", tensor.name)

    measured, journal, place, name = statistics.importance(tensor.name), run.journal, "", ""
    if journal is not None and (known := journal.at_place(tensor, measured)) is not None:
        run.source.rely_on_state()
        progress(math.prod(tensor.shape))
        return known
    value = run.source.read(tensor.name)
    matrix, is_shifted = _target(statistics, tensor, value, run.device)
    importance = _importance(run.source, tensor, matrix, measured)
    if journal is not None:
        place = journal.place_name(tensor, measured)
        name = journal.bytes_name(tensor, matrix if is_shifted else value, measured if measured else importance)
        if (known := journal.of_bytes(name, tensor)) is not None:
            journal.put(place, name, *known)
            progress(math.prod(tensor.shape))
            return known
    if run.share is not None and not run.share:
        raise ModelError(f"{tensor.name}: what a shard has kept of it is damaged; run that shard again")
    del value
    try:
        parts = tensor.codec.encode(matrix, importance, progress=progress, backend=run.options.backend)
    except CodecError as refused:
        raise CodecError(f"{tensor.name}: {refused}") from None
    except torch.linalg.LinAlgError as failed:  # type: ignore[attr-defined]
        raise ModelError(f"{tensor.name}: its Hessian is not positive definite ({failed})") from None
    report = _measured(tensor, parts, matrix, measured, time.perf_counter() - started)
    if journal is not None:
        journal.put(place, name, parts, report)
    return parts, report


def _importance(source: Source, tensor: TensorPlan, matrix: Tensor, importance: Importance) -> Importance:
    """Return the importance that a tensor's codec has use for, of what is known."""
    codec = tensor.codec
    if importance.is_none and codec.uses_norm_heuristic:
        power = source.norm_power(tensor.name)
        if power is not None and len(power) == matrix.shape[1]:  # a convolution's columns are its kernel's places too
            return Importance.from_norms(matrix, power)
    return importance.zero_as_none() if isinstance(codec, HessianFitting) else importance.per_channel()


def apply_tuning(
    statistics: Statistics,
    parts: Parts,
    report: TensorReport,
    factors: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> tuple[Parts, TensorReport]:
    """Return a tensor's parts and report after tuning.

    Args:
        statistics: that it was fitted with.
        parts: of the fitted tensor.
        report: of the fitted tensor.
        factors: of the rows of packed tensors [out], by tensor name.
        values: of raw tensors, by the model's parameter.
    """
    source, tensor, device = statistics.source, report.plan, parts["weight"].device
    if tensor.name in factors:
        assert isinstance(tensor.codec, RowScaling)
        rescaled = tensor.codec.rescaled(parts, factors[tensor.name].to(device))
        matrix, _ = _target(statistics, tensor, source.read(tensor.name), device)
        return rescaled, _measured(tensor, rescaled, matrix, statistics.importance(tensor.name), report.seconds)
    value = next((values[p] for p in source.parameters(tensor.name) if p in values), None)
    if value is None:
        return parts, report
    return tensor.codec.encode(value.cpu().to(TORCH_DTYPES[tensor.dtype])), report


def decoded(tensor: TensorPlan, parts: Parts, device: torch.device) -> Tensor:
    """Return a packed tensor in its dense shape, float32."""
    on_device = {name: part.to(device) for name, part in parts.items()}
    weight = tensor.codec.decode(on_device, tensor.codec_shape, torch.float32)
    return (weight.mT if tensor.transposed else weight).reshape(tensor.shape)


def as_matrix(value: Tensor, tensor: TensorPlan) -> Tensor:
    """Return the value of a tensor as its codec sees it [out, in]."""
    return (value.mT if tensor.transposed else value).reshape(tensor.codec_shape)


def _target(statistics: Statistics, tensor: TensorPlan, value: Tensor, device: torch.device) -> tuple[Tensor, bool]:
    """Return the matrix that a tensor of a value is fitted to, and whether that is another one, shifted."""
    matrix = _in_float(as_matrix(value, tensor).to(device), tensor)
    shift = statistics.shift(tensor.name)
    return (matrix, False) if shift is None else (matrix.float() + shift.to(device), True)


def _in_float(matrix: Tensor, tensor: TensorPlan) -> Tensor:
    """Return a matrix in float32, or where its codec takes a few rows at a time, as it is."""
    return matrix if tensor.codec.row_by_row and matrix.dtype != torch.float64 else matrix.float()


def _largest(values: Tensor) -> float:
    """Return the largest magnitude of values that are finite in float32."""
    return float(values.masked_fill(~torch.isfinite(values.float()), 0).double().abs().max())


def _require_fits(tensor: TensorPlan, largest: float) -> None:
    """Refuse a tensor whose values become infinite in the dtype that it is loaded in."""
    if tensor.dtype[0] in "FB" and largest > (limit := torch.finfo(TORCH_DTYPES[tensor.dtype]).max):
        raise NonfiniteError(
            f"{tensor.name}: values up to {largest:.3g} do not fit {tensor.dtype}, whose largest is {limit:.3g}; "
            "pass --dtype bfloat16 or float32 (dtype=…)"
        )


def _measured(tensor: TensorPlan, parts: Parts, matrix: Tensor, importance: Importance, seconds: float) -> TensorReport:
    """Return the report of a tensor's parts, some rows at a time: errors of weights, and of outputs where a Hessian is known.

    Raises:
        NonfiniteError: decoded, it does not fit its dtype.
    """
    hessian, largest = None, 0.0
    if importance.values is not None and importance.has_hessian:
        hessian = importance.values.to(matrix.device, torch.float32)
    sums = torch.zeros(4, dtype=torch.float64)
    for index in torch.arange(len(matrix)).split(max(1, WEIGHTS_AT_ONCE // matrix.shape[1])):
        rows = matrix[index].double()
        decoded = tensor.codec.decode_rows(parts, index, tuple(matrix.shape), torch.float32)
        largest = max(largest, float(decoded.abs().max()))
        for i, values in enumerate((rows - decoded, rows)):
            sums[i] += values.square().sum().cpu()
            if hessian is not None:
                sums[2 + i] += ((values.float() @ hessian).double() * values).sum().clamp_min(0).cpu()
    _require_fits(tensor, largest)
    return TensorReport(tensor, float(sums[0]), float(sums[1]), seconds, float(sums[2]), float(sums[3]))
