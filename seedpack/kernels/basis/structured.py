"""Structured bases: Hadamard matrices and random signs in place of noise, so that a weight costs log M additions
instead of M random words (Fastfood, Le, Sarlos and Smola, ICML 2013; with signs alone as structured orthogonal features,
Yu et al., arXiv 1610.09072).

With K the power of two from M on, at least 64, and z the coefficients filled up with zeros, each K weights of a block (a
*piece*) are

    √K · H · S2 · H · S1 · z

H is Sylvester's Hadamard matrix over √K, S1 and S2 are diagonals of signs, others for each piece. The basis vectors' entries are of
mean 0 and variance 1 and nearly normal. On each piece the vectors are exactly orthogonal: only the last one, which is cut,
keeps them from being an orthogonal frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from seedpack.kernels.basis.noise_basis import NoiseBasis, require_coefficients, rows_per_block
from seedpack.kernels.dispatch import Backend, Kernels, kernels_for
from seedpack.keys import keystream_words
from seedpack.prng import philox_words
from seedpack.prng import signs as signs_of

BACKENDS = ("cpu", "reference")  # on GPUs too the reference's products with small matrices serve well
LEAST = 64  # K: below it the entries are far from normal
WEIGHTS_AT_ONCE = 1 << 21


def width_of(count: int) -> int:
    """Return K.

    >>> width_of(10), width_of(64), width_of(10_000)
    (64, 64, 16384)
    """
    return max(LEAST, 1 << (count - 1).bit_length())


@lru_cache(maxsize=8)
def piece_signs(seed: int, key: str, first: int, pieces: int, width: int, device: torch.device) -> Tensor:
    """Return S1 and S2 of some pieces, int8 [2, pieces, width]: piece p has bits [2·K·p, 2·K·(p + 1)) of the stream, S1 before S2.

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


class StructuredBasis(NoiseBasis):
    """Signs and Hadamard matrices, made for whole pieces of a weight."""

    variance: ClassVar[float] = 1.0
    takes_key: ClassVar[bool] = True
    fused: ClassVar[bool] = False

    def dense(
        self, coefs: Tensor, rows: int, columns: int, index: Tensor | None = None, backend: Backend = "auto"
    ) -> Tensor:
        """Make all blocks, and cut the last one."""
        require_coefficients(coefs.shape, rows)
        size = rows_per_block(rows, len(coefs)) * columns
        weight = self.expand(coefs, size, backend).view(-1, columns)[:rows]
        return weight if index is None else weight[index]

    def dense_cost(self, blocks: int, count: int, rows: int, columns: int) -> int:
        """Return the weight in whole blocks, twice, or its work in whole pieces; and the signs of the pieces that are made at once."""
        width, size = width_of(count), rows_per_block(rows, blocks) * columns
        weights, whole = blocks * size, blocks * -(-size // width) * width
        return 8 * max(weights, whole // 2) + 80 * min(whole, max(WEIGHTS_AT_ONCE, width))

    def reduce(
        self,
        weight_grad: Tensor,
        blocks: int,
        count: int,
        rows: int,
        index: Tensor | None = None,
        backend: Backend = "auto",
    ) -> Tensor:
        """Take all blocks, the last one filled up with zeros."""
        require_coefficients((blocks, count), rows)
        whole_rows, columns = blocks * rows_per_block(rows, blocks), weight_grad.shape[1]
        if index is None:
            whole = torch.nn.functional.pad(weight_grad, (0, 0, 0, whole_rows - rows))
        else:
            whole = weight_grad.new_zeros(whole_rows, columns).index_add_(0, index, weight_grad)
        return self.reduce_blocks(whole.reshape(blocks, -1), count, backend)

    def expand(self, coefs: Tensor, size: int, backend: Backend = "auto") -> Tensor:
        """Return the weights of each block, float32 [blocks, size], from coefficients [blocks, M]."""
        blocks, count = coefs.shape
        kernels, width = _kernels(backend, coefs), width_of(count)
        padded = torch.nn.functional.pad(coefs.detach().float(), (0, width - count))
        out = torch.empty(blocks, size, dtype=torch.float32, device=coefs.device)
        for chunk, pieces, signs in self._chunks(blocks, size, width, coefs.device):
            values = kernels.expand(padded[chunk], signs).flatten(1)
            end = min(size, pieces.stop * width)
            out[chunk, pieces.start * width : end] = values[:, : end - pieces.start * width]
        return out

    def reduce_blocks(self, weight_grad: Tensor, count: int, backend: Backend = "auto") -> Tensor:
        """Transpose `expand`: return float32 [blocks, count] from the gradient to the weights [blocks, size]."""
        blocks, size = weight_grad.shape
        kernels, width = _kernels(backend, weight_grad), width_of(count)
        out = torch.zeros(blocks, width, dtype=torch.float32, device=weight_grad.device)
        for chunk, pieces, signs in self._chunks(blocks, size, width, weight_grad.device):
            end = min(size, pieces.stop * width)
            values = weight_grad.detach()[chunk, pieces.start * width : end].float()
            values = torch.nn.functional.pad(values, (0, pieces.stop * width - end)).reshape(signs.shape[1:])
            out[chunk] += kernels.reduce(values, signs)
        return out[:, :count]

    def _chunks(
        self, blocks: int, size: int, width: int, device: torch.device
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield what is made at once: blocks, pieces of each, and their signs [2, blocks, pieces, K]."""
        pieces = -(-size // width)
        most = max(1, WEIGHTS_AT_ONCE // width)
        step = max(1, most // pieces)
        for block in range(0, blocks, step):
            chunk = slice(block, min(block + step, blocks))
            for piece in range(0, pieces, most):
                part = slice(piece, min(piece + most, pieces))
                first, per_block = block * pieces + piece, part.stop - part.start
                signs = piece_signs(self.seed, self.key, first, (chunk.stop - block) * per_block, width, device)
                yield chunk, part, signs.view(2, -1, per_block, width)


def _kernels(backend: Backend, like: Tensor) -> Kernels:
    return kernels_for("basis.structured", backend, like.device, among=BACKENDS)
