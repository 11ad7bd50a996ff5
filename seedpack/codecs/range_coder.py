"""Constriction's coders, where they are installed."""

from __future__ import annotations

from typing import Any

from seedpack.errors import BackendError


def stream(codec: str) -> Any:
    """Return Constriction's module of stream codes.

    Args:
        codec: that needs it, for the message.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import constriction
    except ImportError:
        raise BackendError(f"{codec}: needs Constriction's range coder; pip install constriction") from None
    module: Any = constriction.stream
    return module
