"""Tiny models with random weights."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.language.architectures.cases import Case
from benchmarks.language.architectures.configs import VARIANTS, config_for

LARGEST = 6_000_000


class CannotBuildError(Exception):
    """Transformers builds a class from none of the tiny configs; the arguments say why, variant by variant."""


def build(case: Case) -> tuple[Any, str]:
    """Return a tiny model with random weights, and the variant of its config."""
    errors = []
    for variant in VARIANTS:
        try:
            require_small(case, variant)
            torch.manual_seed(0)
            model = case.model_class(config_for(case.model_type, case.model_class, variant)).eval()
        except Exception as error:  # foreign code: whatever it raises, the next variant may do
            errors.append(described(error))
            continue
        model = model.float()
        shake_(model)
        return model, variant
    raise CannotBuildError(*dict.fromkeys(errors))


def require_small(case: Case, variant: str) -> None:
    """Refuse a model of too many weights before its memory is taken."""
    with torch.device("meta"):
        model = case.model_class(config_for(case.model_type, case.model_class, variant))
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > LARGEST:
        name, parameter = max(model.named_parameters(), key=lambda named: named[1].numel())
        raise ValueError(f"too large: {count:,} weights, {name} alone {list(parameter.shape)}")


@torch.no_grad()
def shake_(model: Any) -> None:
    """Add noise to every parameter: constants, as the zeros of gates and the ones of norms, would hide errors."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            spread = float(parameter.std()) if parameter.dim() > 1 and parameter.numel() > 1 else 0.0
            parameter.add_(noise * (0.5 * max(spread, 0.05) if parameter.dim() > 1 else 0.02))


def described(error: BaseException) -> str:
    """Return an error's type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
