"""Shape annotations (jaxtyping's where it is installed, which the tests check), and a check of the shape users get wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seedpack.errors import ModelError

if TYPE_CHECKING:
    from jaxtyping import Float as Float
    from jaxtyping import Int as Int
    from jaxtyping import Int8 as Int8
    from jaxtyping import UInt8 as UInt8
else:
    try:
        from jaxtyping import Float, Int, Int8, UInt8
    except ImportError:

        class _Unchecked:
            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Float = Int = Int8 = UInt8 = _Unchecked


def require_columns(what: str, x: Any, columns: int) -> None:
    """Raise a ModelError unless an input [..., columns] fits: a regenerated weight would take any width for its own."""
    if x.shape[-1] != columns:
        raise ModelError(f"{what}: an input {list(x.shape)}, expected [..., {columns}]")
