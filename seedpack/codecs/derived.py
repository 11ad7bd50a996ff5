"""What a codec derives from its stored parts for every product (scales in float32, …): made once a device, kept with the part.

Not stored with the model: a loader would leave it unfilled, and it would cost memory where no product is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Value = TypeVar("Value")
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def derived(part: Tensor, settings: object, make: Callable[[], Value]) -> Value:
    """`make()`, or what it gave before for this part with these settings, unless the part was written to since."""
    state = (settings, part.data_ptr(), 0 if part.is_inference() else part._version)
    known: tuple[Any, Value] | None = _kept.get(part)
    if known is None or known[0] != state:
        known = (state, make())
        _kept[part] = known
    return known[1]
