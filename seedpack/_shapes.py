"""Shape annotations: jaxtyping's where it is installed (the tests check them), plain tensors elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float as Float
    from jaxtyping import Int as Int
    from jaxtyping import UInt8 as UInt8
else:
    try:
        from jaxtyping import Float, Int, UInt8
    except ImportError:

        class _Unchecked:
            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Float = Int = UInt8 = _Unchecked
