"""Frozen pseudorandom weights and a learnt mask: edge-popup (Ramanujan et al., CVPR 2020, arXiv 1911.13299)."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from seedpack.codecs.base import matrix_shape
from seedpack.codecs.mask import MaskCodec, frozen_signs, kept_of
from seedpack.errors import NonfiniteError
from seedpack.keys import add_key, default_seed
from seedpack.loader.trained import SeededModule, StoredTensor
from seedpack.reparam.targets import NORMS, fan_in, refresh_recurrent, targets_of


def mask_(
    model: nn.Module,
    kept: float = 0.5,
    *,
    seed: int | None = None,
    gain: float = math.sqrt(2),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    key: bytes | None = None,
) -> nn.Module:
    """Freeze a model at pseudorandom weights and train which of them are there, in place; returns the model.

    Each weight is ±gain / √(fan_in · kept), the signed Kaiming constant scaled by the share that is kept; in each forward
    pass those of the largest |score| are kept, and the gradient passes straight through to the scores. Everything else is
    frozen: torch's norms at gain 1 and bias 0 (non-affine batch norm, whose statistics still run), other norms as they are,
    biases of the layers at 0.

    Args:
        model: dense.
        kept: the share of each tensor's weights that is *kept*, above 0 and below 1.
        seed: of the signs, and of the scores to start from; default 0, with a key a random one.
        gain: of the nonlinearity; √2 for ReLU.
        include: patterns (fnmatch) of parameter names; given, only these.
        exclude: patterns of parameter names that stay as they are, and trainable.
        key: 16 bytes that replace the seed and are not stored (see `seedpack.keys`).

    Raises:
        ModelError: a pattern matches nothing, or a parameter cannot be reparametrised.
        CodecError: a setting is out of range.
    """
    seed = default_seed(seed, key)
    codec = MaskCodec(kept, seed, "" if key is None else add_key(key))
    targets = targets_of(model, include, exclude, matrices=True)
    masked = {id(target.module) for target in targets}
    excluded = {
        id(p) for name, p in model.named_parameters() if any(fnmatch.fnmatch(name, pattern) for pattern in exclude)
    }
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or id(parameter) in excluded:
                continue
            parameter.requires_grad_(False)
            if isinstance(module, NORMS) or (id(module) in masked and parameter.dim() == 1):
                nn.init.constant_(parameter, float(isinstance(module, NORMS) and leaf == "weight"))
    noise = torch.Generator().manual_seed(seed)
    for number, target in enumerate(targets):
        weight = target.parameter.requires_grad_(True)
        own = dataclasses.replace(codec, seed=(seed + number) % 2**63)
        inputs = fan_in(target.module, weight)
        scale, bound = gain / math.sqrt(inputs * kept), 1 / math.sqrt(inputs)  # the bound: kaiming_uniform of a = √5
        scores = (torch.rand(weight.shape, dtype=torch.float32, generator=noise) * 2 - 1) * bound
        supermask = Supermask(own, tuple(weight.shape), scale, weight.device)
        with torch.no_grad():
            weight.copy_(scores)
        parametrize.register_parametrization(target.module, target.leaf, supermask)
        refresh_recurrent(target.module)
    return model


class _Kept(torch.autograd.Function):
    """1 for the largest values, 0 for the others; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, count: int) -> Tensor:
        flat = values.flatten()
        mask = torch.zeros_like(flat)
        if count:
            above = flat >= flat.kthvalue(len(flat) - count + 1).values
            exact = int(above.sum()) == count  # else several values equal the least that is kept
            mask[above if exact else flat.topk(count).indices] = 1
        return mask.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


def kept_mask(values: Tensor, count: int) -> Tensor:
    """Return 1 for the `count` largest values, 0 for the others, straight through in the backward pass."""
    return _Kept.apply(values, count)  # type: ignore[no-any-return, no-untyped-call]


class Supermask(SeededModule):
    """The parametrisation scale · sign · mask of a tensor's scores."""

    signs: Tensor

    def __init__(self, codec: MaskCodec, shape: tuple[int, ...], scale: float, device: torch.device):
        super().__init__()
        self.codec, self.shape = codec, shape
        self.scale = float(torch.tensor(scale, dtype=torch.float32))
        signs = frozen_signs(codec.seed, matrix_shape(shape), device, codec.key)
        self.register_buffer("signs", signs.view(shape).to(torch.int8), persistent=False)

    def forward(self, scores: Tensor) -> Tensor:
        """Return the weight, of the scores' shape."""
        kept: Tensor = kept_mask(scores.abs(), kept_of(self.codec.kept, scores.numel()))
        return self.signs.to(scores.dtype) * self.scale * kept

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the scores, which the optimiser sees."""
        return value

    def to_parts(self, originals: Any) -> StoredTensor:
        """Return the weight as it is stored."""
        if not bool(torch.isfinite(originals.original).all()):
            raise NonfiniteError("a mask's scores hold NaN or Inf; save an earlier state of the training")
        with torch.no_grad():
            mask = kept_mask(originals.original.abs(), kept_of(self.codec.kept, math.prod(self.shape))) > 0
        return StoredTensor(self.shape, self.codec, self.codec.stored(mask.view(matrix_shape(self.shape)), self.scale))
