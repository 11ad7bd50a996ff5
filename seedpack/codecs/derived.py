"""Values that a codec derives from its stored parts for every product (scales in float32, …), kept with the part on its device.

They are not stored with the model: a loader would leave them unfilled, and they would cost memory where no product runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Value = TypeVar("Value")
_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()


def derived(part: Tensor, settings: object, compute: Callable[[], Value]) -> Value:
    """Return `compute()`, from the cache unless the part was written to since or the settings are others."""
    state = (settings, part.data_ptr(), 0 if part.is_inference() else part._version)
    entry: tuple[Any, Value] | None = _cache.get(part)
    if entry is None or entry[0] != state:
        entry = (state, compute())
        _cache[part] = entry
    return entry[1]
