"""The codec contract.

A codec is a small value: a frozen dataclass of its hyperparameters. It sees a weight as a matrix
[out_features, in_features] (a convolution's trailing axes are flattened into the second) and turns it into named
integer tensors, its *parts*, laid out [out_features, groups along the input, …]. Fields must be JSON values.

    parts(shape)                     dtype and shape of each part, known before fitting
    encode(weight, importance)       weight -> parts
    decode(parts, shape, dtype)      parts -> weight; the definition
    rows(parts, index)               the parts of some rows, for embeddings, where parts belong to rows
    matmul(x, parts, shape, bias)    x @ weight.T + bias
    matmul_transposed(grad, …)       grad @ weight, for the backward pass
    bits_per_weight(shape)           all that is stored, scales and padding counted
    decoding_cost(shape)             what decode takes, so that a file that asks for too much is refused first

A codec writes the first three; the others are given, and may be replaced. `interfaces.py` has what a codec may be able to
do beside it: several rates, fitting with a Hessian, rows that are scaled once they are packed.
`docs/adding-a-codec.md` shows a whole codec.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from seedpack._shapes import Float
from seedpack.codecs.importance import ImportanceLike
from seedpack.dtypes import TORCH_DTYPES, dtype_name
from seedpack.errors import CodecError
from seedpack.formats import CodecSpec, PartSpec
from seedpack.formats.header import level_of, nbytes
from seedpack.kernels.common.row_tiles import Product
from seedpack.kernels.dispatch import Backend
from seedpack.keys import CHECK

Shape = tuple[int, ...]
Parts = dict[str, Tensor]
Progress = Callable[[int], None]


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """Return the matrix shape that a codec sees: the first axis, and all others flattened.

    >>> matrix_shape((16, 3, 3, 3))
    (16, 27)
    """
    if len(shape) < 2 or 0 in shape:
        raise CodecError(f"a weight of shape {list(shape)} is not a matrix; store it raw")
    return shape[0], math.prod(shape[1:])


@dataclasses.dataclass(frozen=True)
class Codec:
    """Base of all codecs; subclasses set `id`, `version` and their fields."""

    id: ClassVar[str]
    version: ClassVar[int]
    older: ClassVar[frozenset[int]] = frozenset()  # older versions that are read, and written where they suffice
    summary: ClassVar[str] = ""  # a line for `seedpack codecs`; by default the docstring's first
    nestable: ClassVar[bool] = True  # whether another codec may pack its matrices by this one
    uses_norm_heuristic: ClassVar[bool] = False  # whether `Importance.from_norms` serves it, where there is no data
    int8_activations: ClassVar[bool] = False  # whether `matmul` takes int8=True: activations rounded to 8 bits

    @property
    def key_check(self) -> str:
        """The check of the private key that the weights come from, or ""."""
        return getattr(self, "key", "")

    @property
    def row_by_row(self) -> bool:
        """True where a row's parts follow from that row and what is told of its columns, so that a few rows are fitted and decoded
        at a time; then `encode` takes weights of any float dtype, and makes no whole copy in another one."""
        return False

    @property
    def int8_by_default(self) -> bool:
        """True where that adds at most about 1% to the error of the weight, so that it is done where it is faster; else 16 bits are."""
        return False

    def rounds_many(self, x: Tensor) -> bool:
        """Return whether products with many tokens x [..., in] are made with int8=True where nothing is asked for: where that is
        faster, and adds at most about 1% to the error of the weight."""
        return False

    def parts(self, shape: Shape) -> dict[str, PartSpec]:
        """Return (dtype name, shape) of each stored part of a weight [out, in]; "weight" is the principal one."""
        raise NotImplementedError

    def encode(
        self,
        weight: Float[Tensor, "out in"],
        importance: ImportanceLike = None,
        *,
        progress: Progress | None = None,
        backend: Backend = "auto",
    ) -> Parts:
        """Fit the weight, on its device, where the parts are then.

        Args:
            weight: float [out, in], finite.
            importance: weight of the squared error of each input channel, positive [in], or, of codecs with
                `HessianFitting`, the Hessian E[x·xᵀ] of the layer's input [in, in]; None is all ones. `Importance.of`
                takes all of them.
            progress: called with the count of weights fitted since the last call.
            backend: which kernels to use.
        """
        raise NotImplementedError

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype, backend: Backend = "auto") -> Tensor:
        """Rebuild the weight [out, in]: exact integers, then one float32 expression, cast to `dtype`."""
        raise NotImplementedError

    def rows(self, parts: Parts, index: Tensor) -> Parts:
        """Return the parts of the rows `index` [n]; `decode` takes them with shape (n, in)."""
        raise NotImplementedError

    def decode_rows(
        self, parts: Parts, index: Tensor, shape: Shape, dtype: torch.dtype, backend: Backend = "auto"
    ) -> Tensor:
        """Return rows of the weight, [n, in]: decode their parts, or all of it where a codec has no `rows`."""
        if type(self).rows is Codec.rows:
            return self.decode(parts, shape, dtype, backend)[index]
        return self.decode(self.rows(parts, index), (len(index), shape[1]), dtype, backend)

    def prepare(self, parts: Parts, shape: Shape, bias: Tensor | None, planes: int) -> Product | None:
        """Return the product of few tokens as a function, or None where there is no faster one than `matmul`.

        It takes x [..., in], contiguous float32 or bfloat16 on the CPU, rounds it to 8 bits (one plane) or to 16 (two), and
        returns x @ weight.T + bias [out] in its dtype.
        """
        return None

    def matmul(
        self,
        x: Tensor,
        parts: Parts,
        shape: Shape,
        bias: Tensor | None = None,
        backend: Backend = "auto",
        **options: bool,
    ) -> Tensor:
        """Return x [..., in] @ weight.T + bias [out], in the dtype of x; options are those of the codec's `_product`."""
        y = self._product(x.reshape(-1, shape[1]), parts, shape, backend, **options)
        if y is None:
            return torch.nn.functional.linear(x, self.decode(parts, shape, x.dtype, backend), bias)
        y = y if bias is None else (y + bias).to(x.dtype)
        return y.view(*x.shape[:-1], shape[0])

    def matmul_transposed(self, grad: Tensor, parts: Parts, shape: Shape, backend: Backend = "auto") -> Tensor:
        """Return grad [..., out] @ weight, the gradient of `matmul` to x."""
        grad_x = self._product_transposed(grad.reshape(-1, shape[0]), parts, shape, backend)
        return grad_x.view(*grad.shape[:-1], shape[1])

    def _product(self, x: Tensor, parts: Parts, shape: Shape, backend: Backend) -> Tensor | None:
        """Return x [tokens, in] @ weight.T straight from the parts, or None: then the weight is rebuilt."""
        return None

    def _product_transposed(self, grad: Tensor, parts: Parts, shape: Shape, backend: Backend) -> Tensor:
        """Return grad [tokens, out] @ weight, by default of the weight rebuilt."""
        return grad @ self.decode(parts, shape, grad.dtype, backend)

    def bits_per_weight(self, shape: Shape) -> float:
        """Return the bits stored per weight, scales and padding counted."""
        stored = sum(nbytes(dtype, part) for dtype, part in self.parts(shape).values())
        return 8 * stored / math.prod(shape)

    def decoding_cost(self, shape: Shape) -> int:
        """Return the bytes of memory that `decode` takes at its peak, the parts left out and a float32 result included.

        Where it takes long for so few bytes, it is as many as take that long: 20 ns of one core each. The form of the parts
        has been checked before. By default it is 8 bytes per weight: the result in float32, and once more in another dtype.
        """
        return 8 * math.prod(shape)

    def checking_cost(self, shape: Shape) -> int:
        """Return the same of `check`, beyond work in proportion to the parts; 0, unless `check` decodes them."""
        return 0

    def check(self, parts: Mapping[str, Tensor], shape: Shape) -> None:
        """Refuse parts that this codec cannot have written for a weight of this shape.

        Raises:
            CodecError: naming the part, what was found and what was expected.
        """
        self.check_form(parts, shape)

    def check_form(self, parts: Mapping[str, Tensor], shape: Shape) -> None:
        """Refuse parts of names, dtypes or shapes that this codec does not write; no element is read.

        A reader of a share of the levels leaves out the last ones.

        Raises:
            CodecError: naming the part, what was found and what was expected.
        """
        expected = self.parts(shape)
        levels = 1 + max(map(level_of, parts), default=0)
        expected = {name: spec for name, spec in expected.items() if level_of(name) < levels}
        if parts.keys() != expected.keys():
            raise CodecError(f"{self.id}: expected parts {sorted(expected)}, found {sorted(parts)}")
        for name, (dtype, part_shape) in expected.items():
            part = parts[name]
            if part.dtype != TORCH_DTYPES[dtype] or tuple(part.shape) != tuple(part_shape):
                raise CodecError(
                    f"{self.id}: part {name!r} of a weight {list(shape)}: expected {dtype} {list(part_shape)}, "
                    f"found {dtype_name(part.dtype)} {list(part.shape)}"
                )

    def spec(self) -> CodecSpec:
        """Return the codec as a file stores it."""
        return CodecSpec(self.id, self.version, dataclasses.asdict(self))

    @classmethod
    def from_config(cls, config: Any) -> Codec:
        """Return the codec of stored hyperparameters; unknown, missing or mistyped ones are an error, never ignored."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(config, Mapping):
            raise CodecError(f"{cls.id}: hyperparameters must be a JSON object, got {type(config).__name__}")
        if config.keys() != fields.keys():
            odd = sorted(config.keys() ^ fields.keys())
            raise CodecError(f"{cls.id}: hyperparameters {sorted(fields)} expected; missing or unknown: {odd[:4]}")
        return cls(**config)


def require_whole(codec: str, name: str, value: object, low: int, high: int) -> None:
    """Refuse a hyperparameter that is not a whole number in a range."""
    if type(value) is not int or not low <= value <= high:
        raise CodecError(f"{codec}: {name} must be a whole number from {low} to {high}, got {value!r}")


def require_check(codec: str, value: object) -> None:
    """Refuse a value that is not the check of a private key."""
    if not isinstance(value, str) or not CHECK.fullmatch(value):
        raise CodecError(
            f"{codec}: key must be 16 hexadecimal digits, the check of a private key, got {str(value)[:40]!r}"
        )


def require_dtype(codec: str, value: object) -> None:
    """Refuse a value that is not a safetensors dtype name."""
    if not isinstance(value, str) or value not in TORCH_DTYPES:
        raise CodecError(f"{codec}: dtype must be one of {', '.join(TORCH_DTYPES)}, got {value!r}")
