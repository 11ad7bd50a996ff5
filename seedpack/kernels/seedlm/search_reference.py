"""The definition of SeedLM's search: brute force over all seeds, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seedpack._shapes import Float
from seedpack.kernels.seedlm.code import SeedLMCode
from seedpack.prng import lfsr_cycle

MANTISSA_MIN, MANTISSA_MAX = -8, 7
EXPONENT_MIN, EXPONENT_MAX = -8, 7
CHUNK_SEEDS = 4096


class BlockFits(NamedTuple):
    """The fit of each block: `seed` int64 [n], `exponent` int64 [n] (bias taken off), `mantissa` int64 [n, P], `error` float64 [n]."""

    seed: Tensor
    exponent: Tensor
    mantissa: Tensor
    error: Tensor


def basis_values(code: SeedLMCode) -> Float[Tensor, " seeds"]:
    """Return (V - 2^(K-1)) / (2^(K-1) - 1) for each state V of the register, in the order of `lfsr_cycle`, float64."""
    states = torch.from_numpy(lfsr_cycle(code.seed_bits).copy()).to(torch.float64)
    return (states - code.half) / (code.half - 1)


def bases(values: Float[Tensor, " seeds"], position: Tensor, code: SeedLMCode) -> Float[Tensor, "n block rank"]:
    """Return U of the seeds at some positions [n] of `basis_values`."""
    index = position[:, None] + 1 + torch.arange(code.states, device=values.device)
    return values[index % len(values)].view(-1, code.block, code.rank)


def all_bases(code: SeedLMCode) -> Float[Tensor, "seeds block rank"]:
    """Return U(s) for each seed, in the order of `lfsr_cycle`, float64."""
    values = basis_values(code)
    return bases(values, torch.arange(len(values)), code)


def quantised(
    t: Tensor, u: Tensor, w: Tensor, factor: Tensor, exponent_bias: int, exponents: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best of the exponents for coefficients t [..., P] of blocks w [..., C]: see `search`.

    Returns:
        ‖error·M‖² [...], M the factor [C, C]; the exponent with the bias taken off [...]; the mantissas [..., P].
    """
    mantissa, power = torch.frexp(t.abs().amax(-1) / 7.5)
    rule = torch.where(mantissa > 0.5, power, power - 1).to(torch.int64)
    rule = torch.where(mantissa == 0, EXPONENT_MIN + exponent_bias, rule)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shift in (0,) if exponents == 1 else (-1, 0, 1):
        e = (rule + shift).clamp(EXPONENT_MIN + exponent_bias, EXPONENT_MAX + exponent_bias)
        scale = torch.ldexp(torch.ones_like(t[..., 0]), e)[..., None]
        q = (t / scale).round().clamp(MANTISSA_MIN, MANTISSA_MAX)
        error = ((w - torch.einsum("...cp,...p->...c", u, q * scale)) @ factor).square().sum(-1)
        if best is not None:
            better = error < best[0]
            error, e = torch.where(better, error, best[0]), torch.where(better, e, best[1])
            q = torch.where(better[..., None], q, best[2])
        best = error, e, q
    assert best is not None
    return best[0], best[1] - exponent_bias, best[2].to(torch.int64)


def search(
    blocks: Float[Tensor, "n block"],
    factor: Float[Tensor, "block block"] | None,
    exponent_bias: int,
    code: SeedLMCode,
    exponents: int,
) -> BlockFits:
    """Find for each block w the (seed, exponent, mantissas) of least ‖(w - U(s)·q·2^(e + bias))·M‖².

    The zero block (all mantissas 0) is always a candidate. For each seed t is the (weighted) least-squares solution of
    U(s)·t = w. Its exponent by the rule is E = ceil(log2(max|t| / 7.5)), the least with which every mantissa round(t / 2^E) fits four bits. With
    `exponents=1` that is the one tried (the paper's method; its printed floor(log2 max|t|) leaves only the codes
    -2 … 2); with 3, E - 1 (with saturation), E and E + 1 are.

    Args:
        blocks: float32 or float64 [n, C].
        factor: M, lower triangular [C, C] of full rank; None is the identity. Diagonal with √h, each place counts h.
        exponent_bias: exponents -8 … 7 are stored with this taken off.
        code: K, C and P.
        exponents: how many are tried for each seed, 1 or 3.
    """
    w = blocks.double()
    n, block = w.shape
    m = torch.eye(block, dtype=torch.float64) if factor is None else factor.double()
    every = all_bases(code)
    cycle = torch.from_numpy(lfsr_cycle(code.seed_bits).copy()).to(torch.int64)
    best = BlockFits(
        torch.ones(n, dtype=torch.int64),
        torch.full((n,), EXPONENT_MIN, dtype=torch.int64),
        torch.zeros(n, code.rank, dtype=torch.int64),
        (w @ m).square().sum(-1),
    )
    row = torch.arange(n)
    for first in range(0, len(every), CHUNK_SEEDS):
        u = every[first : first + CHUNK_SEEDS]
        t = torch.einsum("spc,nc->nsp", torch.linalg.pinv(m.mT @ u), w @ m)
        errors, e, q = quantised(t, u, w[:, None], m, exponent_bias, exponents)
        error, at = errors.min(1)
        better = error < best.error
        best = BlockFits(
            torch.where(better, cycle[first + at], best.seed),
            torch.where(better, e[row, at], best.exponent),
            torch.where(better[:, None], q[row, at], best.mantissa),
            torch.where(better, error, best.error),
        )
    return best
