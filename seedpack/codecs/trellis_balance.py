"""Per-channel scaling of weights that are rotated then, in four bits for each input channel (docs/codecs/trellis.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from seedpack.codecs.importance import Importance, column_power


def channel_scaling(weight: Tensor, importance: Importance) -> Tensor:
    """Return the four bits of each input channel, int64 [in]: the quarter octave nearest to its best factor, with geometric mean 1.

    Args:
        weight: [out, in].
        importance: of the input channels, none, per channel, or a Hessian.
    """
    power = column_power(weight)
    if not power.sum():
        return torch.full((weight.shape[1],), 8)
    power = power.clamp_min(1e-6 * power.mean())
    if importance.has_hessian:
        octaves = importance.diagonal(damped=True).cpu().log2() / 8 - power.log2() * 3 / 8
    else:
        h = importance or Importance.from_norms(weight)
        octaves = (h.channel_weights() / power).log2() / 4
    return ((octaves - octaves.mean()) * 4).round().clamp(-8, 7).long() + 8
