"""Calibration where nobody has chosen any: of causal language models, on text that they write themselves."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch

from seedpack.converter.options import SELF, Calibration, CompressOptions
from seedpack.converter.sources.base import Source
from seedpack.formats.places import is_remote
from seedpack.memory import free_bytes
from seedpack.units import duration

ENABLED = True
WRITERS = ("ForCausalLM", "LMHeadModel")  # endings of the names of causal language models
MEMORY = 16  # bytes for each weight: with less a model in float32 is left on the disk, where it writes slowly
PASSES = 2.5  # over the model for each token: one writes, one reads, and the second moments
IN_SEQUENCE = 1.5  # more
MEASURING = 6  # and for a budget: calibrated before it is measured, and measured twice
ROWS, WIDTH, PRODUCTS, SECONDS = (
    32,
    1024,
    100,
    1.0,
)  # of the product that a processor's speed is taken from, and at most


def with_usual_calibration(source: Source, options: CompressOptions) -> CompressOptions:
    """Return options in which `auto` is decided: the model's own text, or none.

    A model is calibrated that writes text, that this process can run, and that lies on a disk and fits the memory; not where the importance of
    inputs is given, and not for codecs that ask for none.
    """
    asked = options.calibration
    if not isinstance(asked, Calibration) or not asked.is_open:
        return options
    names = (source.config or {}).get("architectures") or []
    serves = (
        ENABLED
        and any(str(name).endswith(WRITERS) for name in names)
        and type(source).open_model is not Source.open_model
        and not is_remote(source.name)
        and options.importance is None
        and options.codec in ("trellis", "seedlm", "svd", "svd+trellis", "svd+seedlm")
        and MEMORY * _weights(source) < free_bytes()
    )
    if not serves:
        return replace(options, calibration=None)
    longest = _longest(source)
    context = asked.context if longest is None else max(2, min(asked.context, longest))
    return replace(options, calibration=replace(asked, text=SELF, context=context, is_usual=True))


def time_of(source: Source, options: CompressOptions) -> str:
    """Return about how long a model's calibration on its own text takes, by the speed of a product of this processor."""
    calibration, has_budget = options.calibrated, options.target_size is not None or bool((options.bits or 0) % 1)
    assert calibration is not None
    passes = PASSES + IN_SEQUENCE * options.in_sequence + MEASURING * (has_budget and calibration.measure)
    x, weight = torch.ones(ROWS, WIDTH, dtype=torch.float32), torch.ones(WIDTH, WIDTH, dtype=torch.float32)
    taken: list[float] = []
    while len(taken) < PRODUCTS and sum(taken) < SECONDS:
        started = time.perf_counter()
        x @ weight
        taken.append(time.perf_counter() - started)
    rate = ROWS * WIDTH * WIDTH / min(taken)  # the first ones start threads, others may wait for programs beside
    return duration(passes * calibration.tokens * _weights(source) / rate)


def _weights(source: Source) -> int:
    return sum(math.prod(tensor.shape) for tensor in source.tensors.values())


def _longest(source: Source) -> int | None:
    """Return the tokens that a model takes at most, where its config says so."""
    config = source.config or {}
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    return longest if type(longest) is int and longest > 1 else None
