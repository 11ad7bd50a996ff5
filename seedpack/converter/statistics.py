"""Statistics of the inputs of a model's layers, that weights are fitted with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from seedpack.codecs.importance import Importance
from seedpack.converter.plan import Plan
from seedpack.converter.sources.base import Source

SHIFT = " shift"  # after a parameter's name: what is added to it before it is fitted [out, in]


class SecondMoments(Protocol):
    """Input second moments E[x·xᵀ] by the names of parameters, and shifts, in memory or on disk."""

    def __contains__(self, name: object, /) -> bool: ...

    def get(self, name: str, /) -> Tensor | None:
        """Return the second moment [in, in] of the input of a weight's layer, or a shift."""
        ...


@dataclass(frozen=True)
class Statistics:
    """Statistics of the inputs of layers, by the names of a source's tensors.

    Attributes:
        source: the model.
        given: by tensor name, the importance of each channel [in], or the Hessian [in, in]; it wins.
        moments: by the model's parameter, the second moment of the layer's input [in, in].
    """

    source: Source
    given: Mapping[str, Tensor] = field(default_factory=dict)
    moments: SecondMoments = field(default_factory=dict[str, Tensor])

    def tensors_with_hessian(self, plan: Plan) -> set[str]:
        """Return the names of a plan's tensors that a Hessian is known for."""
        names = {tensor.name for tensor in plan.tensors}
        given = {name for name in names & self.given.keys() if Importance.of(self.given[name]).has_hessian}
        return given | {name for name in names - self.given.keys() if self._parameter(name) is not None}

    def importance(self, name: str) -> Importance:
        """Return the importance of the input channels of a tensor's layer."""
        if name in self.given:
            return Importance.of(self.given[name])
        parameter = self._parameter(name)
        return Importance.of(None if parameter is None else self.moments.get(parameter))

    def shift(self, name: str) -> Tensor | None:
        """Return what is added to a tensor before it is fitted, to make up for others that are packed [out, in]; or None."""
        parameter = None if name in self.given else self._parameter(name)
        return None if parameter is None else self.moments.get(f"{parameter}{SHIFT}")

    def _parameter(self, name: str) -> str | None:
        return next((p for p in self.source.parameters(name) if p in self.moments), None)
