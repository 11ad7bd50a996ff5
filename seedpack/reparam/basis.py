"""Weights that are one combination of pseudorandom basis vectors.

PRANC (Nooralinejad et al., ICCV 2023, arXiv 2206.08464), and with a structured basis Li et al. (ICLR 2018, arXiv
1804.08838).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.coefficients import as_stored, level_slices, values_of
from seedpack.errors import ModelError
from seedpack.formats import View
from seedpack.kernels.basis import HADAMARD
from seedpack.keys import add_key, default_seed
from seedpack.loader.trained import Piece, SharedCoefficients
from seedpack.reparam.targets import BASIS_LEAF, Target, fan_in, refresh_recurrent, targets_of


def basis_(
    model: nn.Module,
    count: int,
    *,
    per: Literal["model", "layer"] = "model",
    block_size: int | None = None,
    generator: str = HADAMARD,
    seed: int | None = None,
    coef_bits: int = 32,
    levels: int = 1,
    start: Literal["random", "weights"] = "random",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    key: bytes | None = None,
) -> nn.Module:
    """Make a model's weights a linear combination of pseudorandom basis vectors, in place; returns the model.

    Each tensor is, in its own scale (the root mean square of its values as they are; of a tensor of zeros that of
    `nn.Linear`'s bias), a piece of Σ_m coefficient_m · (basis vector m). The optimiser sees the coefficients, and the
    parameters that are left alone: norms, whose running statistics stay too (as in PRANC). `seedpack.save` stores a seed and
    the coefficients.

    Args:
        model: dense.
        count: coefficients, of the model, of each layer, or of each block.
        per: "model": one vector for all; "layer": one for each module that has weights of its own.
        block_size: weights that share a vector, of the model's or a layer's; None is all.
        generator: "hadamard": a structured basis, 2·log2(count) additions per weight and step. "philox": dense noise as in
            the paper (uniform), regenerated for each step: count random numbers per weight and step.
        seed: of the basis, and of the coefficients to start from; default 0, with a key a random one.
        coef_bits: of a coefficient in the file: 32, 16, or 2 to 8; training sees coefficients so rounded (straight through).
        levels: in how many parts the coefficients are stored, so that the first of them already give a usable model
            (`seedpack.load(…, fraction=0.25)`): each training step uses the first few alone, a number drawn anew (nested
            dropout, Rippel et al., ICML 2014).
        start: "random": coefficients N(0, 1 / count), so that weights start at their scale; "weights": the projection of
            the weights as they are (little of them: count / weights of their energy).
        include: patterns (fnmatch) of parameter names; given, only these; else all that are trained, but those of norms.
        exclude: patterns of parameter names to leave alone.
        key: 16 bytes that replace the seed and are not stored (see `seedpack.keys`); for "hadamard".

    Raises:
        ModelError: a pattern matches nothing, or a parameter cannot be reparametrised.
        CodecError: a setting is out of range.
    """
    if per not in ("model", "layer") or start not in ("random", "weights"):
        raise ModelError(f"basis_: per must be model or layer, got {per!r}; start random or weights, got {start!r}")
    if block_size is not None and (type(block_size) is not int or block_size < 1):
        raise ModelError(f"basis_: block_size must be a whole number from 1, got {block_size!r}")
    seed = default_seed(seed, key)
    codec = BasisCodec(
        generator, count=count, coef_bits=coef_bits, seed=seed, key="" if key is None else add_key(key), levels=levels
    )
    targets = targets_of(model, include, exclude, matrices=False)
    groups: dict[int, list[Target]] = {}
    for target in targets:
        groups.setdefault(0 if per == "model" else id(target.module), []).append(target)
    holders = [model if per == "model" else group[0].module for group in groups.values()]
    if any(BASIS_LEAF in holder._parameters for holder in holders):
        raise ModelError("the model has a basis already; choose all of its parameters in one call")
    for number, (holder, group) in enumerate(zip(holders, groups.values(), strict=True)):
        own = dataclasses.replace(codec, seed=(seed + number) % 2**63)
        _reparametrise(holder, group, own, block_size, start)
    return model


def _reparametrise(
    holder: nn.Module, group: list[Target], codec: BasisCodec, block_size: int | None, start: str
) -> None:
    size = sum(target.parameter.numel() for target in group)
    blocks = 1 if block_size is None else -(-size // block_size)
    codec = dataclasses.replace(codec, blocks=blocks)
    shape = (blocks, -(-size // blocks))
    device = group[0].parameter.device
    unit = codec.noise.variance**0.5
    pieces, flat, offset = [], torch.zeros(math.prod(shape), dtype=torch.float32, device=device), 0
    for target in group:
        value = target.parameter.detach()
        scale = _scale_of(target) / unit
        pieces.append(View("", offset, tuple(value.shape), scale))
        flat[offset : offset + value.numel()] = value.flatten() / scale
        offset += value.numel()
    if start == "weights":
        coefs = values_of(
            dataclasses.replace(codec, coef_bits=32, levels=1).encode(flat.view(shape)), codec.count_of(shape), 32
        )
    else:
        noise = torch.Generator().manual_seed(codec.seed)
        coefs = (
            torch.randn(blocks, codec.count_of(shape), dtype=torch.float32, generator=noise).to(device)
            * codec.count_of(shape) ** -0.5
        )
    basis = Basis(holder, codec, shape, coefs)
    holder.register_forward_pre_hook(basis.hold)
    holder.register_forward_hook(basis.release, always_call=True)
    with torch.no_grad():
        basis.hold()
    for target, piece in zip(group, pieces, strict=True):
        dtype = target.parameter.dtype
        parametrize.register_parametrization(target.module, target.leaf, BasisPiece(basis, piece, dtype))
        refresh_recurrent(target.module)
    basis.release()


def _scale_of(target: Target) -> float:
    """Return the root mean square of a parameter; of zeros, as many biases are at the start, that of nn.Linear's biases."""
    rms = float(target.parameter.detach().float().square().mean().sqrt())
    if rms > 0:
        return rms
    weight = getattr(target.module, "weight", None)
    return (3 * fan_in(target.module, weight)) ** -0.5 if isinstance(weight, Tensor) and weight.dim() > 1 else 1.0


class Basis(SharedCoefficients):
    """The coefficients of a module's weights, a parameter of it, and the tensor [blocks, size] that they stand for."""

    leaf = BASIS_LEAF
    remedy = "reparametrise it with the same settings"

    def __init__(self, holder: nn.Module, codec: BasisCodec, shape: tuple[int, int], coefs: Tensor):
        self.holder, self.codec, self.stored_shape = holder, codec, shape
        self._held: Tensor | None = None
        self._count = coefs.shape[1]  # coefficients that the pass uses
        self.nested = codec.levels > 1  # whether training steps use the first few levels alone
        holder.register_parameter(self.leaf, nn.Parameter(coefs))  # not a child: a Sequential would run it

    @property
    def coefs(self) -> nn.Parameter:  # type: ignore[override]
        """The parameter, as the module has it: moving a model can replace it."""
        return self.holder._parameters[self.leaf]  # type: ignore[return-value]

    def flat(self) -> Tensor:
        """Return the tensor, flat: that of the forward pass that is running, or materialised anew.

        Nothing of its size is kept for the backward pass.
        """
        if self._held is not None:
            return self._held
        coefs = as_stored(self.coefs, self.codec.coef_bits)
        if self._count < coefs.shape[1] and self.holder.training:
            coefs = torch.nn.functional.pad(coefs[:, : self._count], (0, coefs.shape[1] - self._count))
        return self.materialise(coefs).flatten()

    def hold(self, *_: object) -> None:
        """Materialise the tensor once for a forward pass; in nested training, of the first few levels alone."""
        self._count = self.coefs.shape[1]
        if self.nested and self.holder.training:  # drawn here: checkpointing materialises the same weights again
            ends = [here.stop for here in level_slices(self._count, self.codec.levels).values()]
            self._count = ends[int(torch.randint(self.codec.levels, ()))]
        self._held = None
        self._held = self.flat()

    def release(self, *_: object) -> None:
        """Free the tensor after a forward pass."""
        self._held = None


class BasisPiece(Piece):
    """A parameter as a piece of a basis."""

    basis: Basis

    def __init__(self, basis: Basis, piece: View, dtype: torch.dtype):
        super().__init__()
        self.basis, self.piece, self.dtype = basis, piece, dtype

    def forward(self) -> Tensor:
        """Return the parameter."""
        size = math.prod(self.piece.shape)
        part = self.basis.flat()[self.piece.offset : self.piece.offset + size].view(self.piece.shape)
        return (part * self.piece.scale).to(self.dtype)

    def get_extra_state(self) -> Tensor:
        """Return the piece's offset and scale for the model's state: they follow from the weights that it had."""
        return torch.tensor([self.piece.offset, self.piece.scale], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the piece of another state."""
        offset, scale = state.tolist()
        self.piece = dataclasses.replace(self.piece, offset=int(offset), scale=scale)

    def right_inverse(self, value: Tensor) -> tuple[()]:
        """Return nothing: the optimiser sees the coefficients of the basis alone."""
        return ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
