"""The svd codec: low rank by randomized SVD (Halko, Martinsson and Tropp 2011), the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from seedpack._shapes import Float
from seedpack.codecs.base import Codec, Parts, Progress, Shape, require_whole
from seedpack.codecs.coefficients import MAX_LEVELS, level_slices
from seedpack.codecs.importance import Importance, ImportanceLike
from seedpack.codecs.interfaces import HessianFitting
from seedpack.codecs.registry import nested_codec
from seedpack.errors import CodecError
from seedpack.formats import PartSpec
from seedpack.kernels.dispatch import Backend
from seedpack.linalg import fixed_order, randomized_svd


@dataclass(frozen=True)
class SVDCodec(Codec, HessianFitting):
    """W ≈ A·B with A = U·√S [out, r] and B = √S·Vh [r, in].

    The test matrix comes from `seed`, so a run can be repeated. Factors are fp16, held as int16 bit patterns, or
    packed by another codec (`factors`). Parts:

    - weight: A, int16 [out, 1, r]; right: B, int16 [r, in].
    - more_1, right_more_1, …: with levels, the further columns of A and rows of B, by descending singular value.
    - with `factors`: that codec's parts of A under their own names, of B with "right_" before them.

    Attributes:
        rank: r; or None, and `bits` says how large it may be.
        bits: budget in bits per weight, from which r follows for each shape; or None.
        factors: {"id": …, "config": {…}} of the codec of the factors, or None for fp16.
        oversampling: further columns of the test matrix; None is 10 + rank / 4.
        power_iterations: of the range finder.
        seed: of the test matrix.
        levels: in how many parts the ranks are stored; the first ones alone give a weight too. For fp16 factors.
    """

    id: ClassVar[str] = "svd"
    version: ClassVar[int] = 0
    summary: ClassVar[str] = "two low-rank factors by randomized SVD, dense or packed by another codec"
    rank: int | None = None
    bits: float | None = None
    factors: dict[str, Any] | None = None
    oversampling: int | None = None
    power_iterations: int = 2
    seed: int = 0
    levels: int = 1

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.bits is None):
            raise CodecError(f"{self.id}: give either rank or bits")
        if self.rank is not None:
            require_whole(self.id, "rank", self.rank, 1, 2**31)
        elif not isinstance(self.bits, (int, float)) or isinstance(self.bits, bool) or not 0 < self.bits <= 64:
            raise CodecError(f"{self.id}: bits must be above 0 and at most 64, got {self.bits!r}")
        if self.oversampling is not None:
            require_whole(self.id, "oversampling", self.oversampling, 0, 2**31)
        require_whole(self.id, "power_iterations", self.power_iterations, 0, 100)
        require_whole(self.id, "seed", self.seed, 0, 2**64 - 1)
        require_whole(self.id, "levels", self.levels, 1, 1 if self.factors is not None else MAX_LEVELS)
        if self.factors is not None:
            self._inner()

    @classmethod
    def over(cls, codec: Codec, **settings: Any) -> SVDCodec:
        """Return an SVD whose factors are packed by `codec`."""
        return cls(factors=codec.spec().to_json(), **settings)

    def _inner(self) -> Codec | None:
        return None if self.factors is None else nested_codec(self.id, "factors", self.factors)

    @property
    def key_check(self) -> str:
        """That of the codec of the factors."""
        inner = self._inner()
        return "" if inner is None else inner.key_check

    def with_hessian(self) -> SVDCodec:
        """Return this codec with the codec of the factors ready for a Hessian."""
        inner = self._inner()
        if not isinstance(inner, HessianFitting):
            return self
        return replace(self, factors=inner.with_hessian().spec().to_json())

    def _levels(self, rank: int) -> int:
        return min(self.levels, rank)

    def rank_of(self, shape: Shape) -> int:
        """Return the rank stored for a weight [out, in]."""
        limit = min(shape)
        if self.rank is not None:
            return min(self.rank, limit)
        assert self.bits is not None
        low, high = 1, limit  # the largest rank whose parts fit the budget; at least 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._bits_at(shape, middle) <= self.bits else (low, middle - 1)
        return low

    def _bits_at(self, shape: Shape, rank: int) -> float:
        return SVDCodec(rank=rank, factors=self.factors).bits_per_weight(shape)

    def parts(self, shape: Shape) -> dict[str, PartSpec]:
        """Return the two factors."""
        rank, inner = self.rank_of(shape), self._inner()
        if inner is None:
            slices = level_slices(rank, self._levels(rank))
            sizes = {name: level.stop - level.start for name, level in slices.items()}
            left: dict[str, PartSpec] = {name: ("I16", (shape[0], 1, size)) for name, size in sizes.items()}
            return left | {_right(name): ("I16", (size, shape[1])) for name, size in sizes.items()}
        left, right = inner.parts((shape[0], rank)), inner.parts((rank, shape[1]))
        return left | {f"right_{name}": spec for name, spec in right.items()}

    def encode(
        self,
        weight: Float[Tensor, "out in"],
        importance: ImportanceLike = None,
        *,
        progress: Progress | None = None,
        backend: Backend = "auto",
    ) -> Parts:
        """Factorise W·S and multiply the right factor by S⁻¹: the best of its rank under ‖(W - Ŵ)·S‖².

        S is √h of each channel's importance, or the Cholesky factor of a Hessian S·Sᵀ, which whitens the input (SVD-LLM,
        Wang et al., arXiv 2403.07378, ICLR 2025).
        """
        importance = Importance.of(importance).require(self.id, weight.shape[1])
        with fixed_order():
            left, right = self._factorise(weight, importance)
        inner = self._inner()
        if inner is None:
            if max(float(left.abs().max()), float(right.abs().max())) > torch.finfo(torch.float16).max:
                raise CodecError(
                    f"{self.id}: the weights are so large that their factors do not fit float16; set factors, or exclude the tensor"
                )
            if progress:
                progress(weight.numel())
            left, right = (f.to(torch.float16).view(torch.int16) for f in (left, right))
            slices = level_slices(right.shape[0], self._levels(right.shape[0]))
            parts = {name: left[:, None, level].contiguous() for name, level in slices.items()}
            return parts | {_right(name): right[level].contiguous() for name, level in slices.items()}
        left_importance = Importance()
        if not isinstance(inner, HessianFitting):
            importance = importance.per_channel()
        elif importance.has_hessian:
            with fixed_order():
                left_importance = importance.through(right).zero_as_none()
        left_parts = inner.encode(left.contiguous(), left_importance, backend=backend)
        right_parts = inner.encode(right.contiguous(), importance, backend=backend)
        if progress:
            progress(weight.numel())
        return left_parts | {f"right_{name}": part for name, part in right_parts.items()}

    def _factorise(self, weight: Tensor, importance: Importance) -> tuple[Tensor, Tensor]:
        """Return the factors [out, rank] and [rank, in], float32."""
        rows, columns = weight.shape
        whitened = weight.float()
        if importance.has_hessian:
            factor = importance.cholesky(weight.device)
            whitened = (weight.double() @ factor).float()
        elif importance:
            root = importance.channel_weights().sqrt().float().to(weight.device)
            whitened = weight.float() * root
        u, s, vh = randomized_svd(
            whitened,
            self.rank_of((rows, columns)),
            oversampling=self.oversampling,
            power_iterations=self.power_iterations,
            seed=self.seed,
        )
        left, right = u * s.sqrt(), s.sqrt()[:, None] * vh
        if importance.has_hessian:
            right = torch.linalg.solve_triangular(factor, right.double(), upper=False, left=False).float()
        elif importance:
            right = right / root
        return left, right

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype, backend: Backend = "auto") -> Tensor:
        """Return A·B, computed in float32."""
        left, right = self._decode_factors(parts, shape, torch.float32, backend)
        return (left @ right).to(dtype)

    def decoding_cost(self, shape: Shape) -> int:
        """Return the product, twice, and both factors; or its work, of large ranks: 50 multiply-adds per nanosecond."""
        rank, weights, inner = self.rank_of(shape), math.prod(shape), self._inner()
        left, right = (shape[0], rank), (rank, shape[1])
        factors = (math.prod(left) + math.prod(right)) * 6 if inner is None else 0
        factors += 0 if inner is None else inner.decoding_cost(left) + inner.decoding_cost(right)
        return max(8 * weights, weights * rank // 1000) + factors

    def checking_cost(self, shape: Shape) -> int:
        """Return that of both factors."""
        rank, inner = self.rank_of(shape), self._inner()
        return 0 if inner is None else inner.checking_cost((shape[0], rank)) + inner.checking_cost((rank, shape[1]))

    def matmul(
        self,
        x: Tensor,
        parts: Parts,
        shape: Shape,
        bias: Tensor | None = None,
        backend: Backend = "auto",
        **options: bool,
    ) -> Tensor:
        """Return (x·Bᵀ)·Aᵀ + bias: r·(in + out) multiply-adds per token instead of in·out."""
        left, right = self._decode_factors(parts, shape, x.dtype, backend)
        return torch.nn.functional.linear(x @ right.mT, left, bias)

    def decode_rows(
        self, parts: Parts, index: Tensor, shape: Shape, dtype: torch.dtype, backend: Backend = "auto"
    ) -> Tensor:
        """Multiply these rows of the left factor by the right one."""
        inner, rank = self._inner(), self.rank_of(shape)
        if inner is None:
            rows = {name: part[index] for name, part in parts.items() if not name.startswith("right")}
            return self.decode(parts | rows, (len(index), shape[1]), dtype, backend)
        left, right = self._split(parts)
        rows_of_left = inner.decode_rows(left, index, (shape[0], rank), torch.float32, backend)
        return (rows_of_left @ inner.decode(right, (rank, shape[1]), torch.float32, backend)).to(dtype)

    def check(self, parts: Mapping[str, Tensor], shape: Shape) -> None:
        """Check the parts' form, that float16 factors are finite, and others by their own codec."""
        super().check(parts, shape)
        inner = self._inner()
        if inner is None:
            finite = (torch.isfinite(part.view(torch.float16)).all() for part in parts.values() if not part.is_meta)
            if not all(finite):
                raise CodecError(f"{self.id}: a factor is NaN or Inf; the file is corrupt")
        else:
            rank = self.rank_of(shape)
            left, right = self._split(dict(parts))
            inner.check(left, (shape[0], rank))
            inner.check(right, (rank, shape[1]))

    @staticmethod
    def _split(parts: Parts) -> tuple[Parts, Parts]:
        right = {name.removeprefix("right_"): part for name, part in parts.items() if name.startswith("right_")}
        return {name: part for name, part in parts.items() if not name.startswith("right_")}, right

    def _decode_factors(
        self, parts: Parts, shape: Shape, dtype: torch.dtype, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        inner = self._inner()
        if inner is None:
            names = [name for name in level_slices(1, MAX_LEVELS) if name in parts]
            left = torch.cat([parts[name][:, 0] for name in names], 1)
            right = torch.cat([parts[_right(name)] for name in names])
            return left.view(torch.float16).to(dtype), right.view(torch.float16).to(dtype)
        left_parts, right_parts = self._split(parts)
        rank = self.rank_of(shape)
        return (
            inner.decode(left_parts, (shape[0], rank), dtype, backend),
            inner.decode(right_parts, (rank, shape[1]), dtype, backend),
        )


def _right(name: str) -> str:
    """Return the name of the right factor's part of a level."""
    return "right" if name == "weight" else f"right_{name}"
