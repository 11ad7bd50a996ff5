"""Constriction's coders, where they are installed."""

from __future__ import annotations

from typing import Any

from seedpack.errors import CodecError


def stream(codec: str, extra: str) -> Any:
    """Its module of stream codes.

    Raises:
        CodecError: it is missing; the codec that needs it, and the extra that brings it.
    """
    try:
        import constriction
    except ImportError:
        raise CodecError(f"{codec}: needs Constriction's range coder; pip install seedpack[{extra}]") from None
    found: Any = constriction.stream
    return found
