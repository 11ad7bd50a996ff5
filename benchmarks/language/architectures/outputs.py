"""Outputs of two models, compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def floats(output: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return every float tensor of an output by name, but for caches."""
    if isinstance(output, Tensor):
        return {prefix or "output": output} if output.is_floating_point() else {}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, dict):
        items = output.items()
    elif isinstance(output, (list, tuple)):
        items = enumerate(output)
    elif dataclasses.is_dataclass(output):
        items = ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))
    found: dict[str, Tensor] = {}
    for name, value in items:
        if "past_key" not in str(name) and "cache" not in str(name):
            found |= floats(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def difference(output: Any, expected: Any) -> tuple[float, str]:
    """Return the largest relative difference ‖a - b‖ / ‖b‖ of two outputs' tensors, and that tensor's name."""
    ours, theirs = floats(output), floats(expected)
    if ours.keys() != theirs.keys():
        return math.inf, f"keys differ: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    worst, place = 0.0, ""
    for name, a in ours.items():
        b = theirs[name]
        if a.shape != b.shape:
            return math.inf, f"{name}: shape {list(a.shape)}, expected {list(b.shape)}"
        distance = relative_distance(a.double(), b.double())
        if distance > worst:
            worst, place = distance, name
    return worst, place


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Return ‖a - b‖ / ‖b‖; equal infinities and NaNs count as equal, others as an infinite distance."""
    same = (a.isnan() & b.isnan()) | (a == b)
    distance = float(torch.where(same, 0.0, a - b).norm() / max(float(b[b.isfinite()].norm()), 1e-12))
    return math.inf if math.isnan(distance) else distance
