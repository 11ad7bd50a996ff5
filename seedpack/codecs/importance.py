"""The importance of input channels: what errors of a weight cost in the layer's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seedpack.errors import CodecError

DAMPING = 0.01  # of a Hessian's mean diagonal, added to it: what no input moved must not be moved at will
LEAST_WEIGHT = 1e-6  # of a channel, where the mean is 1


@dataclass(frozen=True, eq=False)
class Importance:
    """The cost of a weight's errors: none (all alike), per input channel, or a Hessian.

    The Hessian is the second moment E[x·xᵀ] of the layer's input: row r of an error E costs E[r]·H·E[r]ᵀ.

    Attributes:
        values: positive [in], the Hessian [in, in], or None.
    """

    values: Tensor | None = None

    @classmethod
    def of(cls, value: ImportanceLike) -> Importance:
        """Return the importance that a tensor or None stands for, or an importance itself."""
        return value if isinstance(value, Importance) else cls(value)

    @classmethod
    def from_norms(cls, weight: Tensor, power: Tensor | None = None) -> Importance:
        """Estimate the importance of each input channel without data: its power over the norm of its weights.

        Trained weights are smaller where the input is stronger; the exponent is measured (docs/codecs/trellis.md).

        Args:
            weight: [out, in].
            power: of each input channel [in], as a norm before the layer gives it; None is all ones.
        """
        norm = column_power(weight).sqrt()
        values = 1 / norm.clamp_min(1e-3 * norm.mean()) if norm.any() else torch.ones_like(norm)
        if power is not None:
            values = values * power.double().clamp_min(1e-6 * power.mean().clamp_min(1e-30))
        return cls(values)

    @property
    def is_none(self) -> bool:
        """True if all errors count alike."""
        return self.values is None

    def __bool__(self) -> bool:
        return self.values is not None

    @property
    def has_hessian(self) -> bool:
        """True if it is a Hessian."""
        return self.values is not None and self.values.dim() == 2

    def require(self, codec: str, columns: int) -> Importance:
        """Return it, or refuse it for a weight of so many columns.

        Raises:
            CodecError: its shape or its values are wrong; the message names the codec.
        """
        if self.values is None:
            return self
        shape = tuple(self.values.shape)
        if self.has_hessian:
            if shape != (columns, columns):
                raise CodecError(
                    f"{codec}: a Hessian of {columns} input channels has shape [{columns}, {columns}], got {list(shape)}"
                )
            if not torch.isfinite(self.values).all() or self.diagonal().mean() <= 0:
                raise CodecError(f"{codec}: a Hessian must be finite, and its diagonal positive")
        elif shape != (columns,):
            raise CodecError(
                f"{codec}: importance must have one value for each of {columns} input channels, got shape {list(shape)}"
            )
        elif not (torch.isfinite(self.values).all() and (self.values >= 0).all() and self.values.sum() > 0):
            raise CodecError(f"{codec}: importance must be finite, not negative, and not all zero")
        return self

    def per_channel(self) -> Importance:
        """Return it without what a Hessian says of pairs of channels."""
        return Importance(self._given.diagonal()) if self.has_hessian else self

    def zero_as_none(self) -> Importance:
        """Return none for a Hessian of zeros, which says that no input ever came in."""
        return Importance() if self.has_hessian and not self._given.any() else self

    def through(self, matrix: Tensor) -> Importance:
        """Return the Hessian of what the input is once it is multiplied by a matrix [out, in]."""
        matrix = matrix.double()
        return Importance(matrix @ self._given.to(matrix.device).double() @ matrix.mT)

    def diagonal(self, damped: bool = False) -> Tensor:
        """Return the importance of each input channel, float64 [in]: as given, or of a Hessian as `damped` has it."""
        if not self.has_hessian:
            return self._given.double()
        diagonal = self._given.diagonal().double()
        return diagonal / diagonal.mean() + DAMPING if damped else diagonal

    def channel_weights(self) -> Tensor:
        """Return the importance of each input channel with mean 1 and off zero, float64 [in], on the CPU."""
        weights = self.diagonal(damped=True).cpu()
        return (weights / weights.mean()).clamp_min(LEAST_WEIGHT)

    def damped(self, padding: int = 0) -> Tensor:
        """Return the Hessian with mean diagonal 1, and damped, float64 [in + padding, in + padding].

        Channels of padding count as the mean, and for nothing but themselves.
        """
        hessian = self._given.double() / self.diagonal().mean()
        hessian.diagonal().add_(DAMPING)
        if not padding:
            return hessian
        padded: Tensor = torch.block_diag(hessian, torch.eye(padding, dtype=hessian.dtype, device=hessian.device))
        return padded

    def cholesky(self, device: torch.device, padding: int = 0) -> Tensor:
        """Return C of `damped` = C·Cᵀ, lower triangular, on a device."""
        factor: Tensor = torch.linalg.cholesky(self.damped(padding).to(device))
        return factor

    @property
    def _given(self) -> Tensor:
        assert self.values is not None
        return self.values


ImportanceLike = Tensor | Importance | None


def column_power(weight: Tensor) -> Tensor:
    """Return the sum of squares of each column of a weight [out, in], float64 [in], taking some rows at a time."""
    power = torch.zeros(weight.shape[1], dtype=torch.float64)
    for rows in weight.detach().cpu().split(max(1, (1 << 20) // weight.shape[1])):
        power += rows.double().square().sum(0)
    return power
