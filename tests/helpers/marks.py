"""Marks for parameters: a default run takes the representative ones, `make test-all` takes all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """Mark each value of a parameter as slow; a tuple holds the values of several parameters."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


def slow_but(chosen: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Mark as slow what is not chosen among the values of a parameter."""
    chosen = list(chosen)
    values = list(values)
    assert all(value in values for value in chosen), "a chosen value is none of the values"
    return [value if value in chosen else slow(value)[0] for value in values]
