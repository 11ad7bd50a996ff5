"""Tell paths from ids of the hub, without opening anything."""

from __future__ import annotations

from pathlib import Path

from seedpack.errors import ModelError
from seedpack.formats.places import is_remote, place


def looks_like_hub_id(text: str) -> bool:
    """Return whether a text that is no path can be "org/name"."""
    parts = text.split("/")
    return len(parts) == 2 and all(part and not part.startswith(".") for part in parts) and not Path(parts[0]).exists()


def require_path_or_id(model: str) -> None:
    """Refuse a model that is no file or folder, and that cannot be an id of the hub.

    Raises:
        ModelError: saying so.
    """
    try:
        is_there = is_remote(model) or place(model).exists() or looks_like_hub_id(model)
    except (OSError, ValueError):
        raise ModelError(f"{model[:80]!r}: not a valid path") from None
    if not is_there:
        raise ModelError(f"{model}: no such file or folder, and not a hub id (org/name)")
