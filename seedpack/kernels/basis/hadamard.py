"""The structured basis: Hadamard matrices and random signs in place of noise, so that a weight costs log M additions
instead of M random words (Fastfood, Le, Sarlos and Smola, ICML 2013; with signs alone as structured orthogonal features,
Yu et al., arXiv 1610.09072).

With K the power of two from M on, at least 64, and z the coefficients filled up with zeros, each K weights of a block (a
*piece*) are

    √K · H · S2 · H · S1 · z

H is Sylvester's Hadamard matrix over √K, S1 and S2 are diagonals of signs, others for each piece. The bases' entries are of
mean 0 and variance 1 and nearly normal. On each piece the bases are exactly orthogonal: only the last one, which is cut,
keeps them from being an orthogonal frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from seedpack.kernels.dispatch import Backend, choose
from seedpack.keys import keystream_words
from seedpack.prng import philox_words
from seedpack.prng import signs as signs_of

BACKENDS = ("cpu", "reference")  # on GPUs too the reference's products with small matrices serve well
LEAST = 64  # K: below it the entries are far from normal
WEIGHTS_AT_ONCE = 1 << 21


def width_of(count: int) -> int:
    """K.

    >>> width_of(10), width_of(64), width_of(10_000)
    (64, 64, 16384)
    """
    return max(LEAST, 1 << (count - 1).bit_length())


@lru_cache(maxsize=8)
def piece_signs(seed: int, key: str, first: int, pieces: int, width: int, device: torch.device) -> Tensor:
    """S1 and S2 of some pieces, int8 [2, pieces, width]: piece p has bits [2·K·p, 2·K·(p + 1)) of the stream, S1 before S2.

    Args:
        seed: of the Philox stream (M22), or of the key's.
        key: the check of a private key, or "".
        first: the first piece.
        pieces: how many.
        width: K.
        device: of the result.
    """
    words, offset = pieces * width // 16, first * width // 16
    if key:
        before = offset % 16
        stream = keystream_words(key, seed, before + words, offset - before)[before:].to(device)
    else:
        stream = philox_words(seed, words, offset, device)
    return signs_of(stream, pieces * 2 * width).to(torch.int8).view(pieces, 2, width).transpose(0, 1).contiguous()


def expand(coefs: Tensor, size: int, seed: int, key: str = "", backend: Backend = "auto") -> Tensor:
    """The weights of each block, float32 [blocks, size], from coefficients [blocks, M]."""
    blocks, count = coefs.shape
    kernels, width = _kernels(backend, coefs), width_of(count)
    padded = torch.nn.functional.pad(coefs.detach().float(), (0, width - count))
    out = torch.empty(blocks, size, dtype=torch.float32, device=coefs.device)
    for some, here, signs in _parts(blocks, size, width, seed, key, coefs.device):
        values = kernels.expand(padded[some], signs).flatten(1)
        end = min(size, here.stop * width)
        out[some, here.start * width : end] = values[:, : end - here.start * width]
    return out


def reduce(weight_grad: Tensor, count: int, seed: int, key: str = "", backend: Backend = "auto") -> Tensor:
    """The transpose of `expand`: float32 [blocks, count] from the gradient to the weights [blocks, size]."""
    blocks, size = weight_grad.shape
    kernels, width = _kernels(backend, weight_grad), width_of(count)
    out = torch.zeros(blocks, width, dtype=torch.float32, device=weight_grad.device)
    for some, here, signs in _parts(blocks, size, width, seed, key, weight_grad.device):
        end = min(size, here.stop * width)
        values = weight_grad.detach()[some, here.start * width : end].float()
        values = torch.nn.functional.pad(values, (0, here.stop * width - end)).reshape(signs.shape[1:])
        out[some] += kernels.reduce(values, signs)
    return out[:, :count]


def _parts(
    blocks: int, size: int, width: int, seed: int, key: str, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks, pieces of each, and their signs [2, blocks, pieces, K]: what is made at once."""
    pieces = -(-size // width)
    most = max(1, WEIGHTS_AT_ONCE // width)
    some_blocks = max(1, most // pieces)
    for block in range(0, blocks, some_blocks):
        some = slice(block, min(block + some_blocks, blocks))
        for piece in range(0, pieces, most):
            here = slice(piece, min(piece + most, pieces))
            each = here.stop - here.start
            first, count = block * pieces + piece, (some.stop - block) * each
            yield some, here, piece_signs(seed, key, first, count, width, device).view(2, -1, each, width)


def _kernels(backend: Backend, given: Tensor) -> Any:
    return import_module(f"seedpack.kernels.basis.hadamard_{choose('hadamard_basis', backend, given.device, BACKENDS)}")
