"""The definition of SeedLM's search: brute force over all seeds, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seedpack._shapes import Float
from seedpack.prng import lfsr_cycle

MANTISSA_MIN, MANTISSA_MAX = -8, 7
EXPONENT_MIN, EXPONENT_MAX = -8, 7
CHUNK_SEEDS = 4096


class Found(NamedTuple):
    """The winners: `seed` int64 [n], `exponent` int64 [n] (bias taken off), `mantissa` int64 [n, P], `error` float64 [n]."""

    seed: Tensor
    exponent: Tensor
    mantissa: Tensor
    error: Tensor


def all_bases(seed_bits: int, block: int, rank: int) -> Float[Tensor, "seeds block rank"]:
    """U(s) for each seed, in the order of `lfsr_cycle`, float64: (V - 2^(K-1)) / (2^(K-1) - 1)."""
    cycle = torch.from_numpy(lfsr_cycle(seed_bits).copy()).to(torch.float64)
    half = 1 << (seed_bits - 1)
    values = (cycle - half) / (half - 1)
    index = torch.arange(1, len(values) + 1)[:, None] + torch.arange(block * rank)
    return values[index % len(values)].view(-1, block, rank)


def search(
    blocks: Float[Tensor, "n block"],
    importance: Float[Tensor, " block"] | None,
    exponent_bias: int,
    seed_bits: int,
    rank: int,
    exponents: int,
) -> Found:
    """For each block w the (seed, exponent, mantissas) of least Σ_c h[c]·(w[c] - (U(s)·q)[c]·2^(e + bias))².

    The zero block (all mantissas 0) is always a candidate. For each seed t is the (weighted) least-squares solution of U(s)·t = w. Its exponent by the rule is
    E = ceil(log2(max|t| / 7.5)), the least with which every mantissa round(t / 2^E) fits four bits. With
    `exponents=1` that is the one tried (the paper's method; its printed floor(log2 max|t|) leaves only the codes
    -2 … 2); with 3, E - 1 (with saturation), E and E + 1 are.

    Args:
        blocks: float32 or float64 [n, C].
        importance: weight h of each place in the block [C], positive; None is all ones.
        exponent_bias: exponents -8 … 7 are stored with this taken off.
    """
    w = blocks.double()
    n, block = w.shape
    h = torch.ones(block, dtype=torch.float64) if importance is None else importance.double()
    root = h.sqrt()
    bases = all_bases(seed_bits, block, rank)
    cycle = torch.from_numpy(lfsr_cycle(seed_bits).copy()).to(torch.int64)
    best = Found(
        torch.ones(n, dtype=torch.int64),
        torch.full((n,), EXPONENT_MIN, dtype=torch.int64),
        torch.zeros(n, rank, dtype=torch.int64),
        (h * w.square()).sum(-1),
    )
    for first in range(0, len(bases), CHUNK_SEEDS):
        u = bases[first : first + CHUNK_SEEDS]
        inverse = torch.linalg.pinv(root[:, None] * u)
        t = torch.einsum("spc,nc->nsp", inverse, root * w)
        mantissa_max, power = torch.frexp(t.abs().amax(-1) / 7.5)
        rule = torch.where(mantissa_max > 0.5, power, power - 1).to(torch.int64)
        rule = torch.where(mantissa_max == 0, EXPONENT_MIN + exponent_bias, rule)
        for shift in (0,) if exponents == 1 else (-1, 0, 1):
            e = (rule + shift).clamp(EXPONENT_MIN + exponent_bias, EXPONENT_MAX + exponent_bias)
            scale = torch.ldexp(torch.ones_like(t[..., 0]), e)[..., None]
            q = (t / scale).round().clamp(MANTISSA_MIN, MANTISSA_MAX)
            residual = w[:, None] - torch.einsum("scp,nsp->nsc", u, q * scale)
            error, at = (h * residual.square()).sum(-1).min(1)
            better = error < best.error
            row = torch.arange(n)
            best = Found(
                torch.where(better, cycle[first + at], best.seed),
                torch.where(better, e[row, at] - exponent_bias, best.exponent),
                torch.where(better[:, None], q[row, at].to(torch.int64), best.mantissa),
                torch.where(better, error, best.error),
            )
    return best
