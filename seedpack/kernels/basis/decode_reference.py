"""The definition of a basis weight: pseudorandom noise times a few coefficients, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Size, Tensor

from seedpack._shapes import Float, Int
from seedpack.errors import CodecError
from seedpack.prng import MASK32, philox, squirrel5

SQUIRREL_STRIDE = 198491317  # between the rows of RANDUMB's two-dimensional noise
UNIT = 2.0**-31  # a signed word as a number in [-1, 1)
WORDS_AT_ONCE = 1 << 20
HADAMARD = "hadamard"  # made in kernels.hadamard_basis, not from noise
GENERATORS = ("philox", "squirrel5", HADAMARD)


def noise(index: Tensor, count: int, seed: int, generator: str) -> Tensor:
    """Noise of some weights, float32 [n, count]: word (n, m) as a signed integer, rounded to float32, times 2^-31.

    - philox: word m mod 4 of the block of counter (n mod 2^32, n / 2^32, m / 4, 0), keyed by the 64-bit seed.
    - squirrel5: at position 198491317·m + n mod 2^32 (RANDUMB's; a weak family, see `prng.squirrel5`).

    Args:
        index: n, the places of weights in the row-major weight, int64 [n].
        count: M.
        seed: 64 bits, of which squirrel5 uses 32.
        generator: "philox" or "squirrel5".
    """
    if generator == "squirrel5":
        position = (index[:, None] + SQUIRREL_STRIDE * torch.arange(count, device=index.device)) & MASK32
        words = squirrel5(position, seed & MASK32)
    else:
        groups = torch.arange(-(-count // 4), device=index.device)
        low, high = (index & MASK32)[:, None].expand(-1, len(groups)), (index >> 32)[:, None].expand(-1, len(groups))
        counter = torch.stack((low, high, groups.expand_as(low), torch.zeros_like(low)), -1)
        words = philox((seed & MASK32, seed >> 32 & MASK32), counter).flatten(1)[:, :count]
    return ((words ^ 0x80000000) - 0x80000000).to(torch.float32) * UNIT


def dense(
    coefs: Float[Tensor, "blocks count"],
    seed: int,
    generator: str,
    rows: int,
    columns: int,
    index: Int[Tensor, " some"],
) -> Float[Tensor, "some columns"]:
    """W[r, c] = Σ_m noise(r·columns + c, m)·coefs[b, m] with b = r / (rows / blocks): RANDUMB's weight for one block.

    Args:
        coefs: float32 [blocks, M]; each block has ceil(rows / blocks) rows, the last what is left.
        seed: of the noise.
        generator: "philox" or "squirrel5".
        rows: of the weight.
        columns: of the weight.
        index: r, the rows that are made.
    """
    block = index // rows_per_block(rows, len(coefs))
    out = torch.empty(len(index), columns, dtype=torch.float32, device=coefs.device)
    for some in _slices(index, columns * coefs.shape[1]):
        values = _of_rows(index[some], columns, coefs.shape[1], seed, generator)
        out[some] = (values @ coefs[block[some]].float()[..., None])[..., 0]
    return out


def reduce(
    weight_grad: Float[Tensor, "some columns"], blocks: int, count: int, seed: int, generator: str, rows: int,
    index: Int[Tensor, " some"],
) -> Float[Tensor, "blocks count"]:  # fmt: skip
    """The transpose of `dense`, float32: Σ over a block's weights of noise times what the weight has, as a gradient."""
    block = index // rows_per_block(rows, blocks)
    out = torch.zeros(blocks, count, dtype=torch.float32, device=weight_grad.device)
    for some in _slices(index, weight_grad.shape[1] * count):
        values = _of_rows(index[some], weight_grad.shape[1], count, seed, generator)
        out.index_add_(0, block[some], (weight_grad[some, None].float() @ values)[:, 0])
    return out


def _of_rows(index: Tensor, columns: int, count: int, seed: int, generator: str) -> Tensor:
    """The noise of some rows' weights, [n, columns, count]."""
    places = index[:, None] * columns + torch.arange(columns, device=index.device)
    return noise(places.flatten(), count, seed, generator).view(len(index), columns, count)


def _slices(index: Tensor, words: int) -> Iterator[slice]:
    """Some rows at a time, of so many words each."""
    step = max(1, WORDS_AT_ONCE // words)
    return (slice(first, first + step) for first in range(0, len(index), step))


def require_basis(generator: str, coefs: Size, rows: int, key: str = "") -> None:
    """Refuse an unknown generator, a key for one that takes none, and coefficients that are not [1 … rows, 1 …].

    Raises:
        CodecError: with what was found and what is expected.
    """
    if generator not in GENERATORS:
        raise CodecError(f"basis: generator must be one of {', '.join(GENERATORS)}, got {generator!r}")
    if key and generator != HADAMARD:
        raise CodecError(f"basis: generator {generator!r} takes no private key; use {HADAMARD!r}")
    if len(coefs) != 2 or not 1 <= coefs[0] <= rows or coefs[1] < 1:
        raise CodecError(
            f"basis: coefficients of a weight of {rows} rows must be [1 to {rows}, 1 or more], got {list(coefs)}"
        )


def rows_per_block(rows: int, blocks: int) -> int:
    """Rows that share coefficients."""
    return -(-rows // blocks)
