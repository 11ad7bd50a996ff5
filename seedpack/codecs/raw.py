"""The raw codec stores the tensor itself: norms, biases, and weights that a plan leaves alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from seedpack.codecs.base import Codec, Parts, Progress, Shape, require_dtype
from seedpack.codecs.importance import ImportanceLike
from seedpack.dtypes import TORCH_DTYPES
from seedpack.formats import PartSpec
from seedpack.formats.header import nbytes
from seedpack.kernels.dispatch import Backend


@dataclass(frozen=True)
class RawCodec(Codec):
    """Store one part, "weight": the tensor in its own dtype, in any shape.

    Attributes:
        dtype: safetensors dtype name.
    """

    id: ClassVar[str] = "raw"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "the tensor as it is"
    nestable: ClassVar[bool] = False
    dtype: str = "F32"

    def __post_init__(self) -> None:
        require_dtype(self.id, self.dtype)

    def parts(self, shape: Shape) -> dict[str, PartSpec]:
        """Return the tensor's own form."""
        return {"weight": (self.dtype, tuple(shape))}

    def encode(
        self,
        weight: Tensor,
        importance: ImportanceLike = None,
        *,
        progress: Progress | None = None,
        backend: Backend = "auto",
    ) -> Parts:
        """Cast the tensor to `dtype`."""
        if progress:
            progress(weight.numel())
        return {"weight": weight.to(TORCH_DTYPES[self.dtype])}

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype, backend: Backend = "auto") -> Tensor:
        """Cast the tensor."""
        return parts["weight"].to(dtype)

    def decoding_cost(self, shape: Shape) -> int:
        """Return the size of a copy, in its own dtype or in float32."""
        return max(nbytes(self.dtype, shape), nbytes("F32", shape))

    def rows(self, parts: Parts, index: Tensor) -> Parts:
        """Return rows of the tensor."""
        return {"weight": parts["weight"][index]}
