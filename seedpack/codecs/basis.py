"""The basis codec: a weight is a linear combination of pseudorandom basis vectors.

PRANC (Nooralinejad et al., ICCV 2023, arXiv 2206.08464), and RANDUMB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from seedpack._shapes import Float
from seedpack.codecs.base import Codec, Parts, Progress, Shape, require_check, require_whole
from seedpack.codecs.coefficients import MAX_LEVELS, WIDTHS, coefficient_parts, stored, values_of
from seedpack.codecs.importance import Importance, ImportanceLike
from seedpack.codecs.interfaces import HessianFitting
from seedpack.errors import CodecError
from seedpack.formats import PartSpec
from seedpack.kernels.basis import HADAMARD, NoiseBasis, noise_basis
from seedpack.kernels.dispatch import Backend

STEPS, TOLERANCE = 50, 1e-6  # of conjugate gradients


@dataclass(frozen=True)
class BasisCodec(Codec, HessianFitting):
    """W = Σ_m coefficient_m · (basis vector m), each block of rows with coefficients of its own. Parts:

    - weight: the coefficients: bit patterns of floats, int16 or int32 [blocks, 1, M]; or codes of `coef_bits` bits, uint8
      [blocks, groups, bytes], c standing for (c + ½)·step.
    - more_1, more_2, …: with levels, the coefficients that follow, in the same form.
    - steps: with codes, float32 bit patterns int32 [blocks, 1].

    It is for training in a random subspace (`seedpack.reparam`, `seedpack.nn`): of a trained matrix, M basis vectors hold
    no more than about M / weights of its energy.

    Attributes:
        generator: of the basis: "hadamard" (structured), "philox" or "squirrel5" (dense noise; the latter RANDUMB's).
        count: M; or None, and `bits` says how many there are.
        bits: bits per weight, from which M follows for each shape; or None.
        blocks: blocks of rows; a weight of fewer rows has one block per row.
        coef_bits: of a coefficient: 32 and 16 are floats, 2 to 8 codes.
        seed: of the basis.
        key: the check of the private key that the basis comes from (`seedpack.keys`), "" for none.
        levels: in how many parts the coefficients are stored; the first ones alone give a weight too.
    """

    id: ClassVar[str] = "basis"
    version: ClassVar[int] = 0
    summary: ClassVar[str] = "a linear combination of pseudorandom basis vectors, best trained in"
    generator: str = HADAMARD
    count: int | None = None
    bits: float | None = None
    blocks: int = 1
    coef_bits: int = 32
    seed: int = 0
    key: str = ""
    levels: int = 1

    def __post_init__(self) -> None:
        if (self.count is None) == (self.bits is None):
            raise CodecError(f"{self.id}: give either count or bits")
        if self.count is not None:
            require_whole(self.id, "count", self.count, 1, 2**31)
        elif not isinstance(self.bits, (int, float)) or isinstance(self.bits, bool) or not 0 < self.bits <= 32:
            raise CodecError(f"{self.id}: bits must be above 0 and at most 32, got {self.bits!r}")
        require_whole(self.id, "blocks", self.blocks, 1, 2**31)
        if type(self.coef_bits) is not int or self.coef_bits not in WIDTHS:
            raise CodecError(
                f"{self.id}: coef_bits must be one of {', '.join(map(str, WIDTHS))}, got {self.coef_bits!r}"
            )
        require_whole(self.id, "seed", self.seed, 0, 2**63 - 1)
        require_whole(self.id, "levels", self.levels, 1, min(MAX_LEVELS, self.count or MAX_LEVELS))
        require_check(self.id, self.key)
        noise_basis(self.generator, self.seed, self.key)  # refuses what there is not

    @classmethod
    def from_bits(cls, bits: float, **settings: Any) -> BasisCodec:
        """Return the codec with as many basis vectors as fit a budget of bits per weight."""
        return cls(**({} if "count" in settings else {"bits": bits}) | settings)

    @cached_property
    def noise(self) -> NoiseBasis:
        """The generator of the basis vectors."""
        return noise_basis(self.generator, self.seed, self.key)

    def blocks_of(self, shape: Shape) -> int:
        """Return the count of blocks of a weight [out, in]."""
        return min(self.blocks, shape[0])

    def count_of(self, shape: Shape) -> int:
        """Return M for a weight [out, in]."""
        if self.count is not None:
            return self.count
        assert self.bits is not None
        return max(self.levels, math.floor(self.bits * math.prod(shape) / (self.coef_bits * self.blocks_of(shape))))

    def parts(self, shape: Shape) -> dict[str, PartSpec]:
        """Return the coefficients, and the steps of their codes."""
        return coefficient_parts(self.blocks_of(shape), self.count_of(shape), self.coef_bits, self.levels)

    def encode(
        self,
        weight: Float[Tensor, "out in"],
        importance: ImportanceLike = None,
        *,
        progress: Progress | None = None,
        backend: Backend = "auto",
    ) -> Parts:
        """Project the weight onto the basis: least squares by conjugate gradients, of the output's error with importance."""
        shape = tuple(weight.shape)
        weigh = _weighting(Importance.of(importance).require(self.id, shape[1]), weight.device)

        def reduced(error: Tensor) -> Tensor:
            count = self.count_of(shape)
            return self.noise.reduce(weigh(error), self.blocks_of(shape), count, shape[0], backend=backend)

        residual = reduced(weight.detach().float())
        coefs, direction = torch.zeros_like(residual), residual
        energy = first = residual.square().sum()
        for _ in range(STEPS):
            if energy <= TOLERANCE**2 * first:
                break
            image = reduced(self._dense(direction, shape, backend))
            step = energy / (direction * image).sum().clamp_min(torch.finfo(torch.float32).tiny)
            coefs, residual = coefs + step * direction, residual - step * image
            before, energy = energy, residual.square().sum()
            direction = residual + energy / before * direction
        if progress:
            progress(weight.numel())
        return stored(coefs, self.coef_bits, self.levels)

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype, backend: Backend = "auto") -> Tensor:
        """Sum the basis vectors times their coefficients; see `kernels.basis`."""
        return self._dense(self._coefs(parts, shape), shape, backend).to(dtype)

    def decode_rows(
        self, parts: Parts, index: Tensor, shape: Shape, dtype: torch.dtype, backend: Backend = "auto"
    ) -> Tensor:
        """Generate these rows alone where the basis is noise, and all of a structured basis."""
        return self._dense(self._coefs(parts, shape), shape, backend, index).to(dtype)

    def decoding_cost(self, shape: Shape) -> int:
        """Return that of the basis, and of coefficients whose codes are unpacked: the bits of a row each in eight bytes, twice."""
        blocks, count = self.blocks_of(shape), self.count_of(shape)
        coefs = blocks * count * (8 if self.coef_bits >= 16 else 8 + 16 * self.coef_bits)
        return self.noise.dense_cost(blocks, count, *shape) + coefs

    def _product(self, x: Tensor, parts: Parts, shape: Shape, backend: Backend) -> Tensor | None:
        """Generate noise inside the product; a structured basis has no such kernel."""
        return self.noise.matmul(x, self._coefs(parts, shape), shape[0], backend) if self.noise.fused else None

    def _product_transposed(self, grad: Tensor, parts: Parts, shape: Shape, backend: Backend) -> Tensor:
        if not self.noise.fused:
            return super()._product_transposed(grad, parts, shape, backend)
        return self.noise.matmul_transposed(grad, self._coefs(parts, shape), shape[1], backend)

    def check(self, parts: Mapping[str, Tensor], shape: Shape) -> None:
        """Check the parts' form, and that coefficients are finite."""
        super().check(parts, shape)
        if parts["weight"].device.type != "meta" and not torch.isfinite(self._coefs(dict(parts), shape)).all():
            raise CodecError(f"{self.id}: a coefficient is NaN or Inf; the file is corrupt")

    def _coefs(self, parts: Parts, shape: Shape) -> Tensor:
        return values_of(parts, self.count_of(shape), self.coef_bits, self.levels)

    def _dense(self, coefs: Tensor, shape: Shape, backend: Backend, index: Tensor | None = None) -> Tensor:
        return self.noise.dense(coefs, shape[0], shape[1], index, backend)


def _weighting(importance: Importance, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function that weighs an error [out, in] by its importance."""
    if importance.has_hessian:
        hessian = importance.damped().to(device, torch.float32)
        return lambda error: error @ hessian
    if importance:
        h = importance.channel_weights().to(device, torch.float32)
        return lambda error: error * h
    return lambda error: error
