"""Before hours are spent: what a plan will take, by fitting samples of the model's own tensors."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from seedpack._version import WRITER
from seedpack.codecs.base import Codec
from seedpack.codecs.interfaces import HessianFitting
from seedpack.codecs.stack import StackCodec
from seedpack.converter.budget import is_spread
from seedpack.converter.fitting import as_matrix, is_usable
from seedpack.converter.options import CompressOptions, fitting_device
from seedpack.converter.plan import Plan, TensorPlan
from seedpack.converter.sources.base import Source
from seedpack.converter.threads import on_threads
from seedpack.errors import ModelError, OutputError
from seedpack.formats.header import DTYPE_BYTES
from seedpack.formats.places import is_remote
from seedpack.formats.remote import SENT_BYTES
from seedpack.formats.staging import kept_of
from seedpack.formats.writer import checkpoint_bytes
from seedpack.memory import free_bytes, resident_bytes
from seedpack.units import duration, size

SAMPLE_SECONDS, PATIENCE = 0.3, 1.0  # how long the last sample is fitted at least, of few weights at most
WARM_SECONDS = 1.0  # after which a machine that was idle works as fast as it will
FIRST_SAMPLED, FEW_SAMPLED, MOST_SAMPLED = 1 << 12, 1 << 18, 1 << 22  # weights; few take longer, each
WORKSPACE = 40_000_000  # bytes that fitting takes, however small a tensor is
START_SECONDS = 4.5  # of a worker, until it fits
MOST_FORMS = 2  # that are sampled, of codecs and counts of columns
BY_WEIGHT = ("trellis", "seedlm")  # codecs whose time goes by the count of weights
CALIBRATED = ("linear", "head", "expert")  # kinds of tensors whose input a calibration measures
HESSIAN_BYTES = 40  # for each pair of input channels, while a tensor is fitted by a Hessian
Form = tuple[Codec, int]


@dataclass(frozen=True)
class Estimate:
    """The time, memory and disk that a run takes.

    Attributes:
        seconds: of checking, fitting and writing; None where a codec's time cannot be told by a sample.
        memory_bytes: of the process at its largest, with its workers, without a calibration's.
        output_bytes: of the files of weights.
        disk_bytes: that are taken until the output stands: what is packed is kept beside it.
        is_calibrated: whether a calibration comes before, which takes time and memory of its own.
    """

    seconds: float | None
    memory_bytes: int
    output_bytes: int
    disk_bytes: int
    is_calibrated: bool = False

    def __str__(self) -> str:
        fitting = "" if self.seconds is None else f"{duration(self.seconds)} of fitting, "
        text = (
            f"{fitting}{size(self.memory_bytes)} of memory, {size(self.output_bytes)} of output "
            f"({size(self.disk_bytes)} of disk until it stands)"
        )
        if self.seconds is None:
            text += "; how long its codec takes, no sample tells"
        return f"after the calibration, whose time and memory are not known yet, {text}" if self.is_calibrated else text


def estimate(source: Source, plan: Plan, options: CompressOptions) -> Estimate:
    """Estimate what a plan will take on this machine, as it is now; rows of two of its tensors are fitted, in about a second.

    Args:
        source: the model.
        plan: of it.
        options: of the run.
    """
    packed = [tensor for tensor in plan.tensors if tensor.packed]
    calibrated = options.calibrated is not None
    if calibrated:
        plan = plan.with_hessians({tensor.name for tensor in packed if tensor.kind in CALIBRATED})
    planned = [tensor.for_writer() for tensor in plan.tensors]
    output = checkpoint_bytes(planned, plan.shared, WRITER, options.shard_bytes if source.config is not None else None)
    disk = output + sum(tensor.stored_bytes for tensor in packed)
    known = all(codec.id in BY_WEIGHT for codec, _ in _by_form(packed))
    seconds = _seconds(source, plan, options, disk) if known else None
    jobs = min(options.jobs, max(1, len(packed)))
    largest = sum(sorted((bytes_to_fit(t, calibrated) for t in plan.tensors), reverse=True)[:jobs])
    memory = (resident_bytes() + WORKSPACE) * (1 if jobs == 1 else jobs + 1) + largest  # with what samples have loaded
    return Estimate(seconds, memory, output, disk, calibrated)


def require_room(plan: Plan, output: Path, jobs: int = 1) -> None:
    """Refuse, before hours are spent, a plan for which the disk or the memory is too small.

    Args:
        plan: the plan.
        output: of the run.
        jobs: tensors that are fitted at once.

    Raises:
        OutputError: the output, with the tensors that are kept until it stands, does not fit the disk.
        ModelError: the largest tensors that are fitted at once do not fit the memory.
    """
    packed = [tensor for tensor in plan.tensors if tensor.packed]
    disk, needed = _disk(plan, output)
    if needed > (free := shutil.disk_usage(disk).free):
        raise OutputError(
            f"{output}: takes {size(needed)} of disk (what is packed is kept twice until it stands), and {disk} has {size(free)} "
            "free; free space, name an output elsewhere, or ask for fewer bits"
        )
    at_once = sorted(map(bytes_to_fit, packed))[-jobs:]
    if (needed := sum(WORKSPACE + taken for taken in at_once)) > (free := free_bytes()):
        largest = max(packed, key=bytes_to_fit).name
        what = f"fitting {largest}" if jobs == 1 else f"fitting {jobs} tensors at once, as {largest},"
        raise ModelError(
            f"{what} takes {size(needed)} of memory, and {size(free)} are free; end other programs, ask for fewer jobs, or leave "
            "large tensors raw (--exclude, exclude=…)"
        )


def _disk(plan: Plan, output: Path) -> tuple[Path, int]:
    """Return where a run takes disk, and how much is still to be taken there."""
    stored = int(plan.totals()["stored_bytes"])
    if is_remote(output):
        return Path(tempfile.gettempdir()), min(stored, SENT_BYTES)
    disk = next(folder for folder in output.absolute().parents if folder.is_dir())
    kept = sum(file.stat().st_size for file in kept_of(output).glob("*.safetensors"))
    return disk, stored + sum(tensor.stored_bytes for tensor in plan.tensors if tensor.packed) - kept


def bytes_to_fit(tensor: TensorPlan, has_hessian: bool = False) -> int:
    """Return the bytes that a tensor takes while it is fitted: as it is read, in float32 where its codec needs all of it so,
    packed, and packed once more while it is kept."""
    element, weights = DTYPE_BYTES[tensor.dtype], math.prod(tensor.shape)
    if not tensor.packed:
        return element * weights
    copy = 0 if element == 4 or (tensor.codec.row_by_row and element < 4) else 4
    columns = tensor.codec_shape[-1] if not isinstance(tensor.codec, StackCodec) else tensor.shape[-1]
    hessian = HESSIAN_BYTES * columns**2 if has_hessian and tensor.kind in CALIBRATED else 0
    return weights * (element + copy) + 2 * tensor.stored_bytes + hessian


def _by_form(tensors: Iterable[TensorPlan]) -> dict[Form, list[tuple[TensorPlan, int]]]:
    """Return the tensors of each codec and count of columns, with the rows of their matrices, most weights first."""
    found: dict[Form, list[tuple[TensorPlan, int]]] = defaultdict(list)
    for tensor in tensors:
        if isinstance(tensor.codec, StackCodec):
            shape = tensor.shape[-2:]
            rows, columns = shape[::-1] if tensor.codec.transposed else shape
            matrices = math.prod(tensor.shape) // (rows * columns)
            found[tensor.codec.inner, columns] += [(tensor, rows)] * matrices
        else:
            rows, columns = tensor.codec_shape
            found[tensor.codec, columns].append((tensor, rows))
    return dict(sorted(found.items(), key=lambda item: -item[0][1] * sum(rows for _, rows in item[1])))


def _seconds(source: Source, plan: Plan, options: CompressOptions, written: int) -> float:
    """Return the seconds that a plan takes, with all that is fitted to measure a budget; a byte that is written takes as long as
    one that is read."""
    fitting, read_rate = _fitting(source, plan, options)
    calibration, has_experts = options.calibrated, any(t.kind == "expert" and t.packed for t in plan.tensors)
    measures = calibration is not None and calibration.measure and calibration.is_text and not has_experts
    if measures and is_spread(plan, options):
        fitting += 2 * _fitting(source, plan.quick(), options)[0] if options.in_sequence else fitting
    read = sum(math.prod(t.shape) * DTYPE_BYTES[t.dtype] * (2 if t.packed else 1) for t in plan.tensors)
    return fitting + read_rate * (read + written)


def _fitting(source: Source, plan: Plan, options: CompressOptions) -> tuple[float, float]:
    """Return the seconds that fitting takes, and those of reading and checking a byte.

    Tensors of rarer forms take as long for each weight as the others.
    """
    jobs, forms = options.jobs, _by_form(tensor for tensor in plan.tensors if tensor.packed)
    fitting, sampled, rest, longest, read_rate = 0.0, 0, 0, 0.0, 0.0
    with on_threads(max(1, torch.get_num_threads() // jobs) if jobs > 1 else None):
        for index, ((codec, columns), members) in enumerate(forms.items()):
            rows = [count for _, count in members]
            if index >= MOST_FORMS:
                rest += columns * sum(rows)
                continue
            matrix, rate = _sample(source, [tensor for tensor, _ in members], codec, columns)
            once, each_row = _costs(codec, matrix, max(rows), options)
            fitting += once * len(rows) + each_row * sum(rows)
            longest = max(longest, once + each_row * max(rows))
            sampled += columns * sum(rows)
            read_rate = max(read_rate, rate)
    fitting *= 1 + rest / max(1, sampled)
    return (fitting if jobs == 1 else max(fitting / jobs, longest) + START_SECONDS), read_rate


def _sample(source: Source, tensors: list[TensorPlan], codec: Codec, columns: int) -> tuple[Tensor, float]:
    """Return rows of one tensor of a form, evenly spread [n, columns], and the seconds per byte of reading and checking it.

    It is the smallest of those that have as many as are fitted at most. The next one is read before, which may load libraries.
    """
    by_size = sorted({tensor.name: tensor for tensor in tensors}.values(), key=lambda tensor: math.prod(tensor.shape))
    large = [tensor for tensor in by_size if math.prod(tensor.shape) >= MOST_SAMPLED]
    for chosen in reversed(large[:2] or by_size[-1:]):
        started = time.perf_counter()
        value = source.read(chosen.name)
        is_usable(value)
        rate = (time.perf_counter() - started) / max(1, value.nbytes)
    if isinstance(chosen.codec, StackCodec):
        matrices = value.reshape(-1, *chosen.shape[-2:])
        matrix = matrices[0].mT if chosen.codec.transposed else matrices[0]
    else:
        matrix = as_matrix(value, chosen)
    count = min(len(matrix), max(1, MOST_SAMPLED // columns))
    return matrix[torch.arange(count) * len(matrix) // count], rate


def _costs(codec: Codec, matrix: Tensor, rows: int, options: CompressOptions) -> tuple[float, float]:
    """Return the seconds that a matrix takes once and for each of its rows, by samples of more and more rows.

    Args:
        codec: of it.
        matrix: rows to sample [n, columns].
        rows: of the matrix.
        options: of the run.
    """
    columns, most, has_hessian = matrix.shape[1], min(rows, len(matrix)), options.calibrated is not None
    few = FEW_SAMPLED * (2 if has_hessian else 1)  # so that the last two samples are no smaller
    count = min(most, max(1, FIRST_SAMPLED // columns))
    _sampled(codec, matrix[:count], options)  # compiles
    started = time.perf_counter()
    fewer, before, elapsed = 0, 0.0, _sampled(codec, matrix[:count], options)
    while count < most and elapsed < (SAMPLE_SECONDS if count * columns >= few else PATIENCE):
        fewer, before, count = count, elapsed, min(2 * count, most)
        elapsed = _sampled(codec, matrix[:count], options)
    while time.perf_counter() - started < WARM_SECONDS:
        elapsed = min(elapsed, _sampled(codec, matrix[:count], options))
        before = min(before, _sampled(codec, matrix[:fewer], options)) if fewer else 0.0
    once = 0.0
    if has_hessian:
        once = min(elapsed, max(0.0, (before * count - elapsed * fewer) / (count - fewer)))
    return once, (elapsed - once) / count


def _sampled(codec: Codec, rows: Tensor, options: CompressOptions) -> float:
    """Return the seconds that it takes to fit some rows and to measure their errors; with a calibration, by a Hessian."""
    device = fitting_device(options.device)
    matrix, columns, hessian = rows.to(device), rows.shape[1], None
    matrix = matrix if codec.row_by_row and matrix.dtype != torch.float64 else matrix.float()
    if options.calibrated is not None and isinstance(codec, HessianFitting):
        codec, hessian = codec.with_hessian(), torch.eye(columns, dtype=torch.float32, device=device)
    started = time.perf_counter()
    parts = codec.encode(matrix, hessian, backend=options.backend)
    index = torch.arange(len(matrix), device=device)
    errors = matrix.double() - codec.decode_rows(parts, index, tuple(matrix.shape), torch.float32)
    total = errors.square().sum() + matrix.double().square().sum()
    if hessian is not None:
        for values in (errors, matrix):
            total += ((values.float() @ hessian).double() * values).sum()
    total.item()
    return time.perf_counter() - started
