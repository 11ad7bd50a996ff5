"""Values that a codec derives from its stored parts for every product (scales in float32, …), kept with the first of them.

They are known by the content of all parts that they come from: not every write moves a tensor or its count of versions
(to `.data`, or in inference mode). They are not stored with the model: a loader would leave them unfilled.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

from torch import Tensor

Value = TypeVar("Value")
COMPARED_BYTES = 1 << 16  # of a part, up to which they are kept and compared; beyond, their digest


@dataclass(frozen=True)
class _Entry:
    content: list[bytes]
    settings: object
    value: Any
    owner: weakref.ref[Tensor]  # forgets the entry when the part is gone


_entries: dict[int, _Entry] = {}  # by id of the owner; that an id is taken anew does no harm, as content decides


def derived(parts: Sequence[Tensor], settings: object, compute: Callable[[], Value]) -> Value:
    """Return `compute()`, or what it returned for parts of the same bytes and equal settings.

    Parts on a GPU are copied to the host, which waits for them.
    """
    content = [_content(part) for part in parts]
    key = id(parts[0])
    entry = _entries.get(key)
    if entry is None or entry.content != content or entry.settings != settings:
        owner = weakref.ref(parts[0], lambda _: _entries.pop(key, None))
        entry = _entries[key] = _Entry(content, settings, compute(), owner)
    return entry.value  # type: ignore[no-any-return]


def _content(part: Tensor) -> bytes:
    octets: bytes = (part if part.is_cpu else part.cpu()).numpy().tobytes()
    return octets if len(octets) <= COMPARED_BYTES else sha256(octets).digest()
