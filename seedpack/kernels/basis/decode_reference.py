"""The definition of a basis weight: pseudorandom noise times a few coefficients, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from seedpack._shapes import Float, Int
from seedpack.kernels.basis.dense_noise import DenseNoise
from seedpack.kernels.basis.noise_basis import rows_per_block
from seedpack.prng import MASK32, philox, squirrel5

SQUIRREL_STRIDE = 198491317  # between the rows of RANDUMB's two-dimensional noise
UNIT = 2.0**-31  # a signed word as a number in [-1, 1)
WORDS_AT_ONCE = 1 << 20


def noise(index: Tensor, count: int, basis: DenseNoise) -> Tensor:
    """Return the noise of some weights, float32 [n, count]: word (n, m) as a signed integer, rounded to float32, times 2^-31.

    - philox: word m mod 4 of the block of counter (n mod 2^32, n / 2^32, m / 4, 0), keyed by the 64-bit seed.
    - squirrel5: at position 198491317·m + n mod 2^32 (RANDUMB's; a weak family, see `prng.squirrel5`).

    Args:
        index: n, the places of weights in the row-major weight, int64 [n].
        count: M.
        basis: generator and seed: 64 bits, of which squirrel5 uses 32.
    """
    seed = basis.seed
    if not basis.philox:
        position = (index[:, None] + SQUIRREL_STRIDE * torch.arange(count, device=index.device)) & MASK32
        words = squirrel5(position, seed & MASK32)
    else:
        groups = torch.arange(-(-count // 4), device=index.device)
        low, high = (index & MASK32)[:, None].expand(-1, len(groups)), (index >> 32)[:, None].expand(-1, len(groups))
        counter = torch.stack((low, high, groups.expand_as(low), torch.zeros_like(low)), -1)
        words = philox((seed & MASK32, seed >> 32 & MASK32), counter).flatten(1)[:, :count]
    return ((words ^ 0x80000000) - 0x80000000).to(torch.float32) * UNIT


def dense(
    coefs: Float[Tensor, "blocks count"], basis: DenseNoise, rows: int, columns: int, index: Int[Tensor, " n"]
) -> Float[Tensor, "n columns"]:
    """Return W[r, c] = Σ_m noise(r·columns + c, m)·coefs[b, m] with b = r / (rows / blocks): RANDUMB's weight for one block.

    Args:
        coefs: float32 [blocks, M]; each block has ceil(rows / blocks) rows, the last what is left.
        basis: the noise.
        rows: of the weight.
        columns: of the weight.
        index: r, the rows that are made.
    """
    block = index // rows_per_block(rows, len(coefs))
    out = torch.empty(len(index), columns, dtype=torch.float32, device=coefs.device)
    for part in row_slices(index, columns * coefs.shape[1]):
        values = noise_of_rows(index[part], columns, coefs.shape[1], basis)
        out[part] = (values @ coefs[block[part]].float()[..., None])[..., 0]
    return out


def noise_of_rows(index: Tensor, columns: int, count: int, basis: DenseNoise) -> Tensor:
    """Return the noise of some rows' weights, [n, columns, count]."""
    places = index[:, None] * columns + torch.arange(columns, device=index.device)
    return noise(places.flatten(), count, basis).view(len(index), columns, count)


def row_slices(index: Tensor, words: int) -> Iterator[slice]:
    """Yield some rows at a time, of so many words each."""
    step = max(1, WORDS_AT_ONCE // words)
    return (slice(first, first + step) for first in range(0, len(index), step))
