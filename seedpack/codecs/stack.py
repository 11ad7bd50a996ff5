"""A stack of matrices, such as the experts of a mixture, each of them under another codec; docs/codecs/stack.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from seedpack._shapes import Float
from seedpack.codecs.base import Codec, Parts, Progress, Shape, require_whole
from seedpack.codecs.importance import Importance, ImportanceLike
from seedpack.codecs.interfaces import Rates
from seedpack.codecs.registry import nested_codec
from seedpack.errors import CodecError
from seedpack.formats import PartSpec
from seedpack.kernels.dispatch import Backend

CALL = 1 << 13  # what decoding a matrix costs at least: 160 µs, as `Codec.decoding_cost` counts them


@dataclass(frozen=True)
class StackCodec(Codec):
    """The weight, row by row, is n matrices [rows, columns]; each is packed alone, and part by part they are stacked.

    Attributes:
        matrix_rows: of each matrix.
        matrix_columns: of each matrix.
        of: the codec of each matrix: its id, version and config.
        transposed: whether that codec sees each matrix transposed, because a model stores it [in, out].
    """

    id: ClassVar[str] = "stack"
    version: ClassVar[int] = 0
    summary: ClassVar[str] = "matrices in one tensor, as of experts, each by another codec; chosen by itself"
    nestable: ClassVar[bool] = False
    matrix_rows: int
    matrix_columns: int
    of: dict[str, Any]
    transposed: bool = False

    def __new__(cls, *settings: Any, **named: Any) -> StackCodec:
        """Return a codec that has rates, if the one that it stacks has them."""
        of = named.get("of", settings[2] if len(settings) > 2 else None)
        return object.__new__(
            _RatedStack if of is not None and isinstance(nested_codec(cls.id, "of", of), Rates) else cls
        )

    def __post_init__(self) -> None:
        require_whole(self.id, "matrix_rows", self.matrix_rows, 1, 2**31)
        require_whole(self.id, "matrix_columns", self.matrix_columns, 1, 2**31)
        if type(self.transposed) is not bool:
            raise CodecError(f"{self.id}: transposed must be true or false, got {self.transposed!r}")

    @classmethod
    def over(cls, codec: Codec, rows: int, columns: int, *, transposed: bool = False) -> StackCodec:
        """Return the stack of matrices [rows, columns] under `codec`."""
        return cls(rows, columns, codec.spec().to_json(), transposed)

    @cached_property
    def inner(self) -> Codec:
        """The codec of each matrix."""
        return nested_codec(self.id, "of", self.of)

    @property
    def key_check(self) -> str:
        """That of the codec of each matrix."""
        return self.inner.key_check

    @property
    def row_by_row(self) -> bool:
        """True where the codec of the matrices fits and decodes them so."""
        return self.inner.row_by_row

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of a matrix as its codec sees it."""
        return (self.matrix_columns, self.matrix_rows) if self.transposed else (self.matrix_rows, self.matrix_columns)

    def count(self, shape: Shape) -> int:
        """Return the count of matrices of a weight."""
        count, rest = divmod(math.prod(shape), self.matrix_rows * self.matrix_columns)
        if rest or not count:
            raise CodecError(
                f"{self.id}: a weight {list(shape)} is no stack of matrices {[self.matrix_rows, self.matrix_columns]}"
            )
        return count

    def parts(self, shape: Shape) -> dict[str, PartSpec]:
        """Return the parts of a matrix, with the count of matrices before their shapes."""
        count = self.count(shape)
        return {name: (dtype, (count, *part)) for name, (dtype, part) in self.inner.parts(self.matrix).items()}

    def encode(
        self,
        weight: Float[Tensor, "out in"],
        importance: ImportanceLike = None,
        *,
        progress: Progress | None = None,
        backend: Backend = "auto",
    ) -> Parts:
        """Fit each matrix; importance is that of the input channels of all of them."""
        importance = Importance.of(importance)
        matrices = weight.reshape(self.count(tuple(weight.shape)), self.matrix_rows, self.matrix_columns)
        matrices = matrices.mT if self.transposed else matrices
        fitted = [self.inner.encode(m.contiguous(), importance, progress=progress, backend=backend) for m in matrices]
        return {name: torch.stack([parts[name] for parts in fitted]) for name in fitted[0]}

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype, backend: Backend = "auto") -> Tensor:
        """Rebuild each matrix."""
        count = self.count(shape)
        weight = torch.empty(count, self.matrix_rows, self.matrix_columns, dtype=dtype, device=parts["weight"].device)
        for index in range(count):
            matrix = self.inner.decode(self.at(parts, index), self.matrix, dtype, backend)
            weight[index] = matrix.mT if self.transposed else matrix
        return weight.view(shape)

    def decode_rows(
        self, parts: Parts, index: Tensor, shape: Shape, dtype: torch.dtype, backend: Backend = "auto"
    ) -> Tensor:
        """Return rows of the weight, [n, in]; only their matrices are decoded, where a row has whole ones."""
        per_row, rest = divmod(shape[1], self.matrix_rows * self.matrix_columns)
        if rest:
            return self.decode(parts, shape, dtype, backend)[index]
        matrices = (index[:, None] * per_row + torch.arange(per_row, device=index.device)).flatten()
        chosen = {name: part[matrices] for name, part in parts.items()}
        return self.decode(chosen, (len(index), shape[1]), dtype, backend)

    @staticmethod
    def at(parts: Mapping[str, Tensor], index: int) -> Parts:
        """Return the parts of one matrix."""
        return {name: part[index] for name, part in parts.items()}

    def decoding_cost(self, shape: Shape) -> int:
        """Return that of all matrices, and the time that a call takes for each."""
        return self.count(shape) * (self.inner.decoding_cost(self.matrix) + CALL)

    def checking_cost(self, shape: Shape) -> int:
        """Return that of all matrices, and the time that a call takes for each."""
        return self.count(shape) * (self.inner.checking_cost(self.matrix) + CALL // 8)

    def check(self, parts: Mapping[str, Tensor], shape: Shape) -> None:
        """Check the parts' form, and each matrix's by its own codec."""
        super().check(parts, shape)
        for index in range(self.count(shape)):
            self.inner.check(self.at(parts, index), self.matrix)


@dataclass(frozen=True)
class _RatedStack(StackCodec, Rates):
    """A stack of matrices under a codec that has rates."""

    def variants(self) -> list[_RatedStack]:
        """Return the stacks of the variants."""
        return [cast(_RatedStack, self._with(codec)) for codec in self._rates.variants()]

    @property
    def rate(self) -> int | float:
        """That of a matrix."""
        return self._rates.rate

    def expected_error(self) -> float:
        """Return that of a matrix."""
        return self._rates.expected_error()

    @property
    def _rates(self) -> Rates:
        return cast(Rates, self.inner)

    def _with(self, codec: Any) -> StackCodec:
        return replace(self, of=codec.spec().to_json())
