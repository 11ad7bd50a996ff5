"""The definition of structured bases, in plain torch."""

from __future__ import annotations

from torch import Tensor

from seedpack._shapes import Float, Int
from seedpack.kernels.rotation.reference import mix


def expand(
    coefs: Float[Tensor, "blocks width"], signs: Int[Tensor, "2 blocks pieces width"]
) -> Float[Tensor, "blocks pieces width"]:
    """Return √K · H · S2 · H · S1 · z for each piece of each block, float32.

    Args:
        coefs: z of each block.
        signs: S1 and S2 of each piece, ±1.
    """
    first, second = signs.float()
    values = mix(mix(coefs[:, None] * first) * second)
    return values * float(values.shape[-1] ** 0.5)


def reduce(
    weight_grad: Float[Tensor, "blocks pieces width"], signs: Int[Tensor, "2 blocks pieces width"]
) -> Float[Tensor, "blocks width"]:
    """Transpose `expand`: return √K · Σ over pieces of S1 · H · S2 · H · g, float32."""
    first, second = signs.float()
    values: Tensor = (mix(mix(weight_grad) * second) * first).sum(1)
    return values * float(values.shape[-1] ** 0.5)
