"""Before hours are spent: what a plan will take, by fitting samples of its tensors."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from seedpack.codecs.base import Codec
from seedpack.codecs.stack import StackCodec
from seedpack.converter.options import CompressOptions, fitting_device
from seedpack.converter.plan import Plan, TensorPlan
from seedpack.formats.header import DTYPE_BYTES
from seedpack.memory import resident_bytes
from seedpack.units import duration, size

SAMPLE_SECONDS, MOST_SAMPLED, FIRST_SAMPLED = 0.3, 1 << 22, 1 << 12
WORKSPACE = 40_000_000  # bytes that fitting takes, however small a tensor is
BY_WEIGHT = ("trellis", "seedlm")  # codecs whose time goes by the count of weights


@dataclass(frozen=True)
class Estimate:
    """The time, memory and disk that a run takes.

    Attributes:
        seconds: of fitting; None where a codec's time cannot be told by a sample, or the layers' outputs are fitted.
        memory_bytes: of the process at its largest, without a calibration's.
        output_bytes: of the tensors as they are stored.
    """

    seconds: float | None
    memory_bytes: int
    output_bytes: int

    def __str__(self) -> str:
        time_text = "" if self.seconds is None else f"{duration(self.seconds)} of fitting, "
        return f"{time_text}{size(self.memory_bytes)} of memory, {size(self.output_bytes)} of output"


def estimate(plan: Plan, options: CompressOptions) -> Estimate:
    """Estimate what a plan will take on this machine, as it is now; samples of noise are fitted, in about a second.

    Args:
        plan: the plan.
        options: of the run.
    """
    packed = [tensor for tensor in plan.tensors if tensor.packed]
    known = options.calibrated is None and all(_inner(tensor.codec).id in BY_WEIGHT for tensor in packed)
    seconds = sum(_seconds(group, options) for group in _by_codec(packed)) if known else None
    memory = resident_bytes() + WORKSPACE + max(map(bytes_to_fit, packed), default=0)
    return Estimate(seconds, memory, int(plan.totals()["stored_bytes"]))


def bytes_to_fit(tensor: TensorPlan) -> int:
    """Return the bytes of a tensor as it is read, in float32, and packed."""
    element: int = DTYPE_BYTES[tensor.dtype]
    return math.prod(tensor.shape) * (element + (0 if element == 4 else 4)) + tensor.stored_bytes


def _inner(codec: Codec) -> Codec:
    return codec.inner if isinstance(codec, StackCodec) else codec


def _by_codec(tensors: Iterable[TensorPlan]) -> list[list[TensorPlan]]:
    groups: dict[Codec, list[TensorPlan]] = defaultdict(list)
    for tensor in tensors:
        groups[_inner(tensor.codec)].append(tensor)
    return list(groups.values())


def _seconds(tensors: list[TensorPlan], options: CompressOptions) -> float:
    """Return the seconds that tensors of one codec take: as many weights as a sample of the largest of them, in its time."""
    largest = max(tensors, key=lambda tensor: math.prod(tensor.shape))
    codec, weights = _inner(largest.codec), sum(math.prod(tensor.shape) for tensor in tensors)
    rows, columns = largest.codec_shape if not isinstance(largest.codec, StackCodec) else largest.shape[-2:]
    count, elapsed = min(rows, max(1, FIRST_SAMPLED // columns)), 0.0
    _sampled(codec, count, columns, options)  # compiles
    while (elapsed := _sampled(codec, count, columns, options)) < SAMPLE_SECONDS:
        if count == rows or 2 * count * columns > MOST_SAMPLED:
            break
        count = min(rows, 2 * count)
    return elapsed * weights / (count * columns)


def _sampled(codec: Codec, rows: int, columns: int, options: CompressOptions) -> float:
    """Return the seconds that a matrix of noise takes."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(fitting_device(options.device))
    started = time.perf_counter()
    parts = codec.encode(matrix, backend=options.backend)
    codec.decode(parts, (rows, columns), torch.float32).sum().item()
    return time.perf_counter() - started
