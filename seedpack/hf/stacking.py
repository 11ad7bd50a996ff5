"""Weight conversions of transformers that stack experts' parts on loading and take them apart on saving."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.core_model_loading import MergeModulelist, SplitModulelist


class StackParts(MergeModulelist):
    """Experts' parts in one tensor, experts first."""

    @property
    def reverse_op(self) -> UnstackParts:
        """The way back."""
        return UnstackParts(dim=self.dim)


class UnstackParts(SplitModulelist):
    """One tensor for each expert, in its own shape (up to transformers 5.17 axes of length one would be lost)."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Split, then restore the shape."""
        (value,) = input_dict.values()
        stacked = value[0] if isinstance(value, list) else value
        parts: dict[str, Tensor] = super().convert(input_dict, *args, **kwargs)  # type: ignore[type-var]
        return {name: part.reshape(stacked.shape[1:]) for name, part in parts.items()}

    @property
    def reverse_op(self) -> StackParts:
        """The way back."""
        return StackParts(dim=self.dim)
