"""Record that a model's own Python code may run, as the caller says; sources and loaders ask here, wherever they are opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_trusted: ContextVar[bool] = ContextVar("remote_code_is_trusted", default=False)


@contextmanager
def trusting_remote_code(trust: bool) -> Iterator[None]:
    """Let the code that lies in a model's folder run meanwhile, if it is trusted."""
    token = _trusted.set(trust or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def trusts_remote_code() -> bool:
    """Return whether that code may run."""
    return _trusted.get()
