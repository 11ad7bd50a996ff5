"""The cost that a codec tells is that of decoding, within a factor: too little lets bombs pass, too much refuses good files."""

from __future__ import annotations

import ctypes
import gc
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from seedpack.codecs.base import Codec, Shape
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.mask import MaskCodec
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.registry import codec_ids
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.stack import StackCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from tests.helpers.bombs import blank_image, parts_of
from tests.helpers.marks import slow_but

SHAPE = (2048, 4096)
CODECS: dict[str, tuple[Codec, Shape]] = {
    "basis": (BasisCodec(count=100), SHAPE),
    "basis philox": (BasisCodec(count=40, generator="philox"), SHAPE),
    "basis of many": (BasisCodec(count=1 << 21, coef_bits=2), (256, 1024)),
    "mask": (MaskCodec(0.5), SHAPE),
    "raw": (RawCodec("F16"), SHAPE),
    "seedlm": (SeedLMCodec(), SHAPE),
    "seedlm of large blocks": (SeedLMCodec(16, 256, 16), SHAPE),
    "stack": (StackCodec.over(SeedLMCodec(), 512, 512), (32, 512 * 512)),
    "svd": (SVDCodec(rank=2), SHAPE),
    "svd of high rank": (SVDCodec(rank=1024), SHAPE),
    "svd+trellis": (SVDCodec.over(TrellisCodec(2), rank=256), SHAPE),
    "trellis": (TrellisCodec(1), SHAPE),
    "trellis of odd width": (TrellisCodec(1), (2048, 63 * 65)),
}
IMAGES = {"field": (1024, 1024, 3), "field, grey": (1024, 1024, 1), "field, thin": (8192, 2, 1)}
BYTE_SECONDS = 20e-9  # the work that counts as a byte
SPARE = 8 << 20


def resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def measured(work: Callable[[], object]) -> tuple[int, float]:
    """Return the bytes that memory grew by at most, and the CPU time; memory that is free is given back before."""
    gc.collect()
    with suppress(OSError, AttributeError):  # other libraries than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.process_time()
    try:
        result = work()
        seconds = time.process_time() - started
        peak = max(peak, resident())
    finally:
        done.set()
        thread.join()
    del result
    return peak - before, seconds


def check_cost(cost: int, memory: int, seconds: float, dense: int) -> None:
    """Compare an estimate with what was measured; memory that the process had already cannot be seen, so `dense` counts too."""
    took = max(memory, seconds / BYTE_SECONDS, dense)
    assert memory <= 1.5 * cost + SPARE
    assert took <= 4 * cost + SPARE
    assert cost <= 6 * took + SPARE


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")


def test_every_codec_is_measured() -> None:
    assert {codec.id for codec, _ in CODECS.values()} | {"field"} == set(codec_ids())


@linux
@pytest.mark.filterwarnings("ignore:.*passed over")
@pytest.mark.parametrize("case", slow_but(("basis", "mask", "svd", "trellis"), CODECS))
def test_decoding_costs_what_the_codec_says(case: str) -> None:
    codec, shape = CODECS[case]
    small = (2 if case == "stack" else 64, shape[1])
    codec.decode(parts_of(codec, small), small, torch.float32)  # kernels are compiled
    parts = parts_of(codec, shape)
    memory, seconds = measured(lambda: codec.decode(parts, shape, torch.float32))
    check_cost(codec.decoding_cost(shape), memory, seconds, 4 * math.prod(shape))


@linux
@pytest.mark.parametrize("case", slow_but(("field",), IMAGES))
def test_rendering_costs_what_the_codec_says(case: str) -> None:
    small, shape, parts = blank_image(64, 64, IMAGES[case][2])
    small.decode(parts, shape, torch.float32)
    codec, shape, parts = blank_image(*IMAGES[case])
    _, seconds = measured(lambda: codec.check(parts, shape))  # decodes the streams, which are kept
    memory, more = measured(lambda: codec.decode(parts, shape, torch.float32))
    check_cost(codec.decoding_cost(shape), memory, seconds + more, 4 * math.prod(shape))
    assert codec.checking_cost(shape) / 4 < seconds / BYTE_SECONDS + SPARE
    assert seconds / BYTE_SECONDS < 4 * codec.checking_cost(shape)


def test_checks_that_decode_cost_something() -> None:
    factors = SVDCodec.over(MaskCodec(0.5), rank=8)
    assert factors.checking_cost((100, 200)) == 8 * 300
    assert not TrellisCodec().checking_cost((100, 200))
