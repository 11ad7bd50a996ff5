"""Coefficients as they are stored: in float32, in half precision, or as codes of a few bits with a step per block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seedpack.codecs.base import Parts
from seedpack.errors import NonfiniteError
from seedpack.formats import PartSpec
from seedpack.kernels.common.bits import pack, packed_shape, signed, unpack

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16, 32)  # bits per coefficient
MAX_LEVELS = 64
CLIPPING = (1.0, 0.85, 0.72, 0.61, 0.52, 0.44, 0.37, 0.32, 0.27)  # of the largest, where codes are few


def level_slices(count: int, levels: int) -> dict[str, slice]:
    """Split coefficients into levels of about the same size, by the name of the part that holds each.

    >>> level_slices(10, 3)
    {'weight': slice(0, 4, None), 'more_1': slice(4, 7, None), 'more_2': slice(7, 10, None)}
    """
    ends = [-(-count * i // levels) for i in range(levels + 1)]
    return {f"more_{i}" if i else "weight": slice(ends[i], ends[i + 1]) for i in range(levels)}


def coefficient_parts(blocks: int, count: int, bits: int, levels: int = 1) -> dict[str, PartSpec]:
    """Return the parts' dtypes and shapes for coefficients [blocks, count]."""
    sizes = {name: level.stop - level.start for name, level in level_slices(count, levels).items()}
    if bits >= 16:
        return {name: ("I16" if bits == 16 else "I32", (blocks, 1, size)) for name, size in sizes.items()}
    coded = {name: ("U8", packed_shape(blocks, size, bits)) for name, size in sizes.items()}
    return {**coded, "steps": ("I32", (blocks, 1))}


def rounded(coefs: Tensor, bits: int) -> Tensor:
    """Return coefficients [blocks, count] rounded as a file of so many bits holds them, float32; not differentiable."""
    return values_of(stored(coefs, bits), coefs.shape[1], bits)


class _AsStored(torch.autograd.Function):
    """Rounding of coefficients whose gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, coefs: Tensor, bits: int) -> Tensor:
        return rounded(coefs, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


def as_stored(coefs: Tensor, bits: int) -> Tensor:
    """Round coefficients [blocks, count] as a file of so many bits holds them, straight through in the backward pass."""
    return coefs if bits == 32 else _AsStored.apply(coefs, bits)  # type: ignore[no-untyped-call]


def stored(coefs: Tensor, bits: int, levels: int = 1) -> Parts:
    """Return the parts of coefficients [blocks, count]: bit patterns of floats, or codes c that stand for (c + ½)·step.

    Codes are in two's complement. The step is that of least squared error among those that reach to some share of the
    block's largest; it has 12 significant bits, so that coefficients that were rounded once are left as they are.
    """
    coefs, slices = coefs.detach().float().contiguous(), level_slices(coefs.shape[1], levels)
    largest = coefs.abs().amax(1, keepdim=True)
    if not bool(torch.isfinite(largest).all()) or (
        bits == 16 and bool((largest > torch.finfo(torch.float16).max).any())
    ):
        raise NonfiniteError(
            f"coefficients cannot be stored in {bits} bits: the largest is {float(largest.max()):.3g}; "
            "scale them down, or save an earlier state of the training"
        )
    if bits >= 16:
        patterns = coefs.half().view(torch.int16) if bits == 16 else coefs.view(torch.int32)
        return {name: patterns[:, None, level].contiguous() for name, level in slices.items()}
    largest = largest.clamp_min(1e-30)
    best, steps = torch.full_like(largest, torch.inf), largest
    for share in CLIPPING:
        step = largest * share / ((1 << (bits - 1)) - 0.5)
        step = ((step.view(torch.int32) + 0xFFF) & ~0xFFF).view(torch.float32)
        error = ((_codes(coefs, step, bits) + 0.5) * step - coefs).square().sum(1, keepdim=True)
        best, steps = torch.where(error < best, error, best), torch.where(error < best, step, steps)
    codes = _codes(coefs, steps, bits).long()
    return {**{name: pack(codes[:, level], bits) for name, level in slices.items()}, "steps": steps.view(torch.int32)}


def values_of(parts: Parts, count: int, bits: int, levels: int = 1) -> Tensor:
    """Return the coefficients, float32 [blocks, count]; 0 for levels that are missing."""
    out = torch.zeros(len(parts["weight"]), count, dtype=torch.float32, device=parts["weight"].device)
    for name, level in level_slices(count, levels).items():
        if name not in parts:
            break
        if bits >= 16:
            out[:, level] = parts[name][:, 0].view(torch.float16 if bits == 16 else torch.float32).float()
        else:
            codes = signed(unpack(parts[name], level.stop - level.start, bits), bits)
            out[:, level] = (codes.float() + 0.5) * parts["steps"].view(torch.float32)
    return out


def _codes(coefs: Tensor, steps: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    return (coefs / steps).floor().clamp(-half, half - 1)
