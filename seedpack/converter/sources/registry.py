"""Openers of sources that other rooms know: by kind, as "module:function", imported when asked for. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

_OPENERS: dict[str, str] = {}


def register_source(kind: str, opener: str) -> None:
    """Register what opens a kind of model.

    Args:
        kind: "folder", "remote" (a folder in remote storage), "hub", "pretrained" (a live module that can save itself), or a file's suffix such as ".gguf".
        opener: "module:function"; the function takes the path and returns a `Source`; that of "pretrained" takes the module,
            and whether it becomes a file; that of "hub" takes a name and returns the path to open.
    """
    _OPENERS[kind] = opener


def opener_of(kind: str) -> Callable[..., Any] | None:
    """Return the function that opens a kind, or None where no room knows it."""
    if kind not in _OPENERS:
        return None
    module, _, name = _OPENERS[kind].partition(":")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


def registered_suffixes() -> set[str]:
    """Return the suffixes of files that other rooms open."""
    return {kind for kind in _OPENERS if kind.startswith(".")}
