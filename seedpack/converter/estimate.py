"""Before hours are spent: what a plan will take, by fitting samples of its tensors."""

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

from seedpack.codecs.base import Codec
from seedpack.codecs.interfaces import HessianFitting
from seedpack.codecs.stack import StackCodec
from seedpack.converter.options import CompressOptions, fitting_device
from seedpack.converter.plan import Plan, TensorPlan
from seedpack.errors import ModelError, OutputError
from seedpack.formats.header import DTYPE_BYTES
from seedpack.formats.places import is_remote
from seedpack.formats.remote import SENT_BYTES
from seedpack.formats.staging import kept_of
from seedpack.memory import free_bytes, resident_bytes
from seedpack.units import duration, size

SAMPLE_SECONDS, MOST_SAMPLED, FIRST_SAMPLED = 0.3, 1 << 22, 1 << 12
WORKSPACE = 40_000_000  # bytes that fitting takes, however small a tensor is
MOST_FORMS = 6  # that are sampled, of codecs and counts of columns
BY_WEIGHT = ("trellis", "seedlm")  # codecs whose time goes by the count of weights
Form = tuple[Codec, int]


@dataclass(frozen=True)
class Estimate:
    """The time, memory and disk that a run takes.

    Attributes:
        seconds: of fitting; None where a codec's time cannot be told by a sample.
        memory_bytes: of the process at its largest, without a calibration's.
        output_bytes: of the tensors as they are stored.
        is_calibrated: whether a calibration comes before, which takes time and memory of its own.
    """

    seconds: float | None
    memory_bytes: int
    output_bytes: int
    is_calibrated: bool = False

    def __str__(self) -> str:
        fitting = "" if self.seconds is None else f"{duration(self.seconds)} of fitting, "
        text = f"{fitting}{size(self.memory_bytes)} of memory, {size(self.output_bytes)} of output"
        return f"after the calibration {text}" if self.is_calibrated else text


def estimate(plan: Plan, options: CompressOptions) -> Estimate:
    """Estimate what a plan will take on this machine, as it is now; samples of noise are fitted, in about a second.

    Args:
        plan: the plan.
        options: of the run.
    """
    packed = [tensor for tensor in plan.tensors if tensor.packed]
    known = all(codec.id in BY_WEIGHT for codec, _ in _by_form(packed))
    seconds = _seconds(packed, options) if known else None
    memory = resident_bytes() + WORKSPACE + max(map(bytes_to_fit, packed), default=0)
    return Estimate(seconds, memory, int(plan.totals()["stored_bytes"]), options.calibrated is not None)


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


def bytes_to_fit(tensor: TensorPlan) -> int:
    """Return the bytes of a tensor as it is read, in float32, and packed."""
    element: int = DTYPE_BYTES[tensor.dtype]
    return math.prod(tensor.shape) * (element + (0 if element == 4 else 4)) + tensor.stored_bytes


def _by_form(tensors: Iterable[TensorPlan]) -> dict[Form, list[int]]:
    """Return the rows of the matrices of each codec and count of columns, most weights first."""
    found: dict[Form, list[int]] = defaultdict(list)
    for tensor in tensors:
        if isinstance(tensor.codec, StackCodec):
            shape = tensor.shape[-2:]
            rows, columns = shape[::-1] if tensor.codec.transposed else shape
            found[tensor.codec.inner, columns] += [rows] * (math.prod(tensor.shape) // (rows * columns))
        else:
            rows, columns = tensor.codec_shape
            found[tensor.codec, columns].append(rows)
    return dict(sorted(found.items(), key=lambda item: -item[0][1] * sum(item[1])))


def _seconds(tensors: Iterable[TensorPlan], options: CompressOptions) -> float:
    """Return the seconds that tensors take; those of rare forms as long for each weight as the others."""
    seconds, sampled, rest = 0.0, 0, 0
    for index, ((codec, columns), rows) in enumerate(_by_form(tensors).items()):
        if index >= MOST_FORMS:
            rest += columns * sum(rows)
            continue
        once, each_row = _costs(codec, columns, max(rows), options)
        seconds += once * len(rows) + each_row * sum(rows)
        sampled += columns * sum(rows)
    return seconds * (1 + rest / max(1, sampled))


def _costs(codec: Codec, columns: int, rows: int, options: CompressOptions) -> tuple[float, float]:
    """Return the seconds that a matrix takes once and for each of its rows, by samples of more and more rows."""
    count = min(rows, max(1, FIRST_SAMPLED // columns))
    _sampled(codec, count, columns, options)  # compiles
    before, elapsed = 0.0, _sampled(codec, count, columns, options)
    while elapsed < SAMPLE_SECONDS and 2 * count <= rows and 2 * count * columns <= MOST_SAMPLED:
        count, before = 2 * count, elapsed
        elapsed = _sampled(codec, count, columns, options)
    once = max(0.0, 2 * before - elapsed) if options.calibrated is not None else 0.0
    return once, (elapsed - once) / count


def _sampled(codec: Codec, rows: int, columns: int, options: CompressOptions) -> float:
    """Return the seconds that a matrix of noise takes; with a calibration, by a Hessian."""
    generator, device = torch.Generator().manual_seed(0), fitting_device(options.device)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(device)
    importance = None
    if options.calibrated is not None and isinstance(codec, HessianFitting):
        codec, importance = codec.with_hessian(), torch.eye(columns, dtype=torch.float32, device=device)
    started = time.perf_counter()
    parts = codec.encode(matrix, importance, backend=options.backend)
    codec.decode(parts, (rows, columns), torch.float32).sum().item()
    return time.perf_counter() - started
