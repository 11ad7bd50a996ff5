"""SeedLM's exact search on the CPU.

The least-squares error of a seed, ‖w‖² - ‖Qᵀw‖² with Q an orthonormal basis of U(s), never exceeds its quantised
error, so only seeds whose least-squares error beats the best quantised error found so far need the exact
evaluation: about four of 65,535.

The bound for all seeds is one pass of SIMD arithmetic. In LFSR order U(s)[c, p] = u[n + 1 + c·P + p] with n the
position of s, so with z[j] = Σ_c w[c]·u[j + c·P] the projections U(s)ᵀw of *all* seeds are z[n+1 … n+P]: one
sliding dot product, C multiply-adds per seed. A lower triangular R(s) from the seed's QR factors turns them into
Qᵀw: P(P+1)/2 more, and P for the squares: C + P(P+3)/2 in all, 17 for C = 8, P = 3. Tiles of seeds stay in the
L1 cache while a chunk of blocks passes; per block only the maximum over each class of `TILE / LANES` seeds is kept.

float32 holds this bound to `_slack`·‖w‖² as long as Mᵀ·U(s) is well conditioned. The other seeds (0.8% at K = 16)
are bounded with their explicit Q instead. Exact evaluation is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seedpack.kernels.common.jit import jit, thread_count
from seedpack.kernels.seedlm.code import SeedLMCode
from seedpack.kernels.seedlm.search_reference import EXPONENT_MAX, EXPONENT_MIN, MANTISSA_MAX, MANTISSA_MIN, BlockFits
from seedpack.prng import lfsr_cycle

TILE = 1024
LANES = 64
MAX_CONDITION = 64.0
CHUNK_BLOCKS = 64
CHUNK_FLOATS = 1 << 18
JOBS_PER_THREAD = 4
FINISH_BLOCKS = 16
LEAST_MANTISSA = 0.49**2 * 4.0**EXPONENT_MIN


def _slack(code: SeedLMCode) -> float:
    """Bound the float32 error of ‖Qᵀw‖² over ‖w‖², for condition numbers up to `MAX_CONDITION`."""
    return 2.0 * code.rank * (code.block + code.rank + 8) * 2.0**-24 * MAX_CONDITION


@jit()
def _qr(u: Any, start: int, factor: Any, q: Any, r: Any) -> bool:
    """Store Q [P, C] and upper R [P, P] of Mᵀ·U(s) by Gram-Schmidt, twice; return False if it has not full rank."""
    rank, block = q.shape
    full = True
    for p in range(rank):
        size = 0.0
        for c in range(block):
            q[p, c] = 0.0
            for d in range(c, block):
                q[p, c] += factor[d, c] * u[start + d * rank + p]
            size += q[p, c] * q[p, c]
        for m in range(rank):
            r[m, p] = 0.0
        for _ in range(2):
            for m in range(p):
                dot = 0.0
                for c in range(block):
                    dot += q[m, c] * q[p, c]
                r[m, p] += dot
                for c in range(block):
                    q[p, c] -= dot * q[m, c]
        norm = 0.0
        for c in range(block):
            norm += q[p, c] * q[p, c]
        if norm <= 1e-24 * size or norm == 0.0:
            full = False
            for c in range(block):
                q[p, c] = 0.0
        else:
            r[p, p] = math.sqrt(norm)
            for c in range(block):
                q[p, c] /= r[p, p]
    return full


@jit(parallel=True)
def _bound_tables(u: Any, seeds: int, factor: Any, largest: float, rank: int, lower: Any, ill: Any) -> None:
    """Fill `lower` [tiles, P(P+1)/2, TILE] with R(s)^-T; mark in `ill` the seeds that it cannot serve.

    A sliding dot product errs by no more than 2^-24·‖U‖·‖M‖·‖w·M‖ times its length; `largest` is ‖M‖².
    """
    block = factor.shape[0]
    for tile in prange(lower.shape[0]):
        q = np.empty((rank, block))
        r = np.empty((rank, rank))
        inverse = np.empty((rank, rank))
        for lane in range(min(TILE, seeds - tile * TILE)):
            n = tile * TILE + lane
            condition = np.inf
            if _qr(u, n + 1, factor, q, r):
                size, inverse_size = 0.0, 0.0
                for p in range(rank):  # inverse of the lower triangular Rᵀ
                    for m in range(p + 1):
                        value = 1.0 if m == p else 0.0
                        for k in range(m, p):
                            value -= r[k, p] * inverse[k, m]
                        inverse[p, m] = value / r[p, p]
                        inverse_size += inverse[p, m] * inverse[p, m]
                for j in range(block * rank):
                    size += largest * u[n + 1 + j] * u[n + 1 + j]
                condition = math.sqrt(size * inverse_size)
            ill[n] = condition > MAX_CONDITION
            i = 0
            for p in range(rank):
                for m in range(p + 1):
                    lower[tile, i, lane] = 0.0 if ill[n] else inverse[p, m]
                    i += 1


@jit()
def _ill_bases(u: Any, positions: Any, factor: Any, rank: int, bases: Any) -> None:
    """Store orthonormal bases of the ill-conditioned seeds, `bases` [P, C, ill]."""
    block = factor.shape[0]
    q = np.empty((rank, block))
    r = np.empty((rank, rank))
    for i in range(positions.shape[0]):
        _qr(u, positions[i] + 1, factor, q, r)
        for p in range(rank):
            for c in range(block):
                bases[p, c, i] = q[p, c]


@jit(fastmath=True)
def _ill_energy(bases: Any, w: Any, dot: Any, energy: Any) -> None:
    """Store ‖Qᵀw‖² of the ill-conditioned seeds, with their explicit bases [P, C, ill]."""
    energy[:] = np.float32(0)
    for p in range(bases.shape[0]):
        dot[:] = np.float32(0)
        for c in range(bases.shape[1]):
            for k in range(energy.shape[0]):
                dot[k] += w[c] * bases[p, c, k]
        for k in range(energy.shape[0]):
            energy[k] += dot[k] * dot[k]


@jit()
def _least_norm(r: Any, t: Any) -> None:
    """Turn t = Qᵀw into the least-norm solution of R·t = Qᵀw where columns are dependent (zeros on R's diagonal).

    The rows of R with a pivot are orthonormalised, R = L·Z; then y solves L·y = Qᵀw, and t = Zᵀ·y.
    """
    rank = r.shape[0]
    z, y = np.zeros((rank, rank)), np.zeros(rank)
    for p in range(rank):
        if r[p, p] == 0.0:
            continue
        y[p] = t[p]
        for m in range(p, rank):
            z[p, m] = r[p, m]
        for k in range(p):
            dot = 0.0
            for m in range(rank):
                dot += z[k, m] * r[p, m]
            for m in range(rank):
                z[p, m] -= dot * z[k, m]
            y[p] -= dot * y[k]
        norm = math.sqrt(np.sum(z[p] ** 2))
        z[p] /= norm
        y[p] /= norm
    for m in range(rank):
        t[m] = np.sum(z[:, m] * y)


@jit()
def _evaluate(
    u: Any, n: int, w: Any, weighted: Any, factor: Any, exponents: int, q: Any, r: Any, t: Any, trial: Any,
    residual: Any, best_error: float, best: Any,
) -> float:  # fmt: skip
    """Quantise the fit of the seed at position n; if it beats `best_error`, store (n, exponent, mantissas) in `best`.

    Ties go to the lower position, so that the result does not depend on the order of the search.
    """
    rank, block = q.shape
    full = _qr(u, n + 1, factor, q, r)
    for p in range(rank):
        t[p] = 0.0
        for c in range(block):
            t[p] += q[p, c] * weighted[c]
    if not full:
        _least_norm(r, t)
    else:
        for p in range(rank - 1, -1, -1):
            for m in range(p + 1, rank):
                t[p] -= r[p, m] * t[m]
            t[p] /= r[p, p]
    largest = 0.0
    for p in range(rank):
        largest = max(largest, abs(t[p]))
    rule = EXPONENT_MIN
    if largest > 0.0:
        mantissa, rule = math.frexp(largest / 7.5)
        if mantissa == 0.5:
            rule -= 1
    spread = 0 if exponents == 1 else 1
    for shift in range(-spread, spread + 1):
        exponent = min(max(rule + shift, EXPONENT_MIN), EXPONENT_MAX)
        scale = math.ldexp(1.0, exponent)
        for p in range(rank):
            trial[p] = min(max(np.rint(t[p] / scale), float(MANTISSA_MIN)), float(MANTISSA_MAX))
        error = 0.0
        for c in range(block):
            fit = 0.0
            for p in range(rank):
                fit += u[n + 1 + c * rank + p] * trial[p]
            residual[c] = w[c] - fit * scale
        for c in range(block):
            miss = 0.0
            for d in range(c, block):
                miss += factor[d, c] * residual[d]
            error += miss * miss
        if error < best_error or (error == best_error and n < best[0]):
            best_error = error
            best[0] = n
            best[1] = exponent
            for p in range(rank):
                best[2 + p] = int(trial[p])
    return best_error


@lru_cache(maxsize=16)
def _make_bound(block: int, rank: int) -> Callable[..., None]:
    """Compile the bound for blocks, with C and P as constants so that LLVM unrolls and vectorises."""
    C, P = np.uint64(block), np.uint64(rank)
    reach = np.uint64(TILE + rank)

    @jit(parallel=True, fastmath=True)
    def bound(u: Any, lower: Any, hw: Any, chunk: int, maxima: Any, tops: Any) -> None:
        for job in prange((hw.shape[0] + chunk - 1) // chunk):
            z0, z1 = np.empty(TILE + 64, np.float32), np.empty(TILE + 64, np.float32)
            last = min(hw.shape[0], (job + 1) * chunk)
            for tile in range(lower.shape[0]):
                window = u[tile * TILE + 1 : tile * TILE + 1 + TILE + P * C + P]
                table = lower[tile]
                for i0 in range(job * chunk, last, 2):  # two blocks share the loads
                    i1 = min(i0 + 1, last - 1)
                    w0, w1 = hw[i0], hw[i1]
                    top0 = maxima[i0, tile * LANES : tile * LANES + LANES]
                    top1 = maxima[i1, tile * LANES : tile * LANES + LANES]
                    for j in range(reach):
                        dot0, dot1 = np.float32(0), np.float32(0)
                        for c in range(C):
                            dot0 += w0[c] * window[j + c * P]
                            dot1 += w1[c] * window[j + c * P]
                        z0[j], z1[j] = dot0, dot1
                    top0[:] = np.float32(0)
                    top1[:] = np.float32(0)
                    for group in range(TILE // LANES):
                        offset = np.uint64(group * LANES)
                        for lane in range(np.uint64(LANES)):
                            energy0, energy1 = np.float32(0), np.float32(0)
                            entry = np.uint64(0)
                            for p in range(P):
                                y0, y1 = np.float32(0), np.float32(0)
                                for m in range(p + np.uint64(1)):
                                    y0 += table[entry, offset + lane] * z0[offset + lane + m]
                                    y1 += table[entry, offset + lane] * z1[offset + lane + m]
                                    entry += np.uint64(1)
                                energy0 += y0 * y0
                                energy1 += y1 * y1
                            top0[lane] = energy0 if energy0 > top0[lane] else top0[lane]
                            top1[lane] = energy1 if energy1 > top1[lane] else top1[lane]
                    best0, best1 = np.float32(0), np.float32(0)
                    for lane in range(LANES):
                        best0 = top0[lane] if top0[lane] > best0 else best0
                        best1 = top1[lane] if top1[lane] > best1 else best1
                    tops[i0, tile], tops[i1, tile] = best0, best1

    return bound


@jit(parallel=True)
def _finish(
    u: Any, u32: Any, seeds: int, lower: Any, ill: Any, ill_bases: Any, w: Any, hw: Any, wm: Any, factor: Any,
    exponents: int, slack: float, spread: float, chunk: int, maxima: Any, tops: Any, fits: Any, errors: Any,
) -> None:  # fmt: skip
    """Search exactly among the seeds that the bound leaves."""
    count, block = w.shape
    rank = ill_bases.shape[0]
    for job in prange((count + chunk - 1) // chunk):
        energy, dot = np.empty(ill.shape[0], np.float32), np.empty(ill.shape[0], np.float32)
        q, r = np.empty((rank, block)), np.empty((rank, rank))
        t, trial, residual = np.empty(rank), np.empty(rank), np.empty(block)
        halves = np.empty(block, np.float32)
        for i in range(job * chunk, min(count, (job + 1) * chunk)):
            total = 0.0
            for c in range(block):
                total += wm[i, c] ** 2
                halves[c] = np.float32(wm[i, c])
            fits[i, 0], fits[i, 1] = 0, EXPONENT_MIN
            fits[i, 2:] = 0
            error = total  # of the zero block, always a candidate
            errors[i] = total
            if total == 0.0:
                continue
            best_tile = int(np.argmax(tops[i]))
            tiny = total * spread < LEAST_MANTISSA  # then the mantissas of every well conditioned seed round to zero
            for step in range(-1, -1 if tiny else lower.shape[0]):  # the most promising first, then all that can win
                tile = best_tile if step < 0 else step
                for lane in range(LANES):
                    bar = tops[i, tile] * (1.0 - slack) if step < 0 else total * (1.0 - slack) - error
                    if tops[i, tile] < bar:
                        break
                    if maxima[i, tile * LANES + lane] < bar:
                        continue
                    for column in range(lane, min(TILE, seeds - tile * TILE), LANES):
                        n = tile * TILE + column
                        value, size = np.float32(0), np.float32(0)
                        entry = 0
                        for p in range(rank):
                            y = np.float32(0)
                            for m in range(p + 1):
                                z = np.float32(0)
                                for c in range(block):
                                    z += hw[i, c] * u32[n + 1 + m + c * rank]
                                y += lower[tile, entry, column] * z
                                size += lower[tile, entry, column] ** 2
                                entry += 1
                            value += y * y
                        if value >= bar and value * size >= LEAST_MANTISSA:  # else all its mantissas are zero
                            error = _evaluate(
                                u, n, w[i], wm[i], factor, exponents, q, r, t, trial, residual, error, fits[i]
                            )
            _ill_energy(ill_bases, halves, dot, energy)
            for k in range(ill.shape[0]):
                if energy[k] >= total * (1.0 - slack) - error:
                    error = _evaluate(
                        u, ill[k], w[i], wm[i], factor, exponents, q, r, t, trial, residual, error, fits[i]
                    )
            errors[i] = error


class _Tables:
    """The tables of one code and one factor, made once for all blocks."""

    def __init__(self, code: SeedLMCode, factor: np.ndarray[Any, Any]):
        block, rank = code.block, code.rank
        values = (lfsr_cycle(code.seed_bits).astype(np.float64) - code.half) / (code.half - 1)
        self.seeds, self.factor = len(values), factor
        tiles = -(-self.seeds // TILE)
        length = tiles * TILE + code.states + rank + 1
        self.u = np.resize(values, length)
        self.u32 = self.u.astype(np.float32)
        self.lower = np.zeros((tiles, rank * (rank + 1) // 2, TILE), np.float32)
        ill = np.zeros(self.seeds, np.bool_)
        _bound_tables(self.u, self.seeds, factor, float(np.linalg.norm(factor, 2)) ** 2, rank, self.lower, ill)
        self.spread = float(np.square(self.lower).sum(1).max())  # bounds |t|² / ‖Qᵀw‖² of well conditioned seeds
        self.ill = np.flatnonzero(ill)
        self.ill_bases = np.empty((rank, block, len(self.ill)), np.float32)
        _ill_bases(self.u, self.ill, factor, rank, self.ill_bases)


@lru_cache(maxsize=4)
def _plain_tables(code: SeedLMCode) -> _Tables:
    return _Tables(code, np.eye(code.block))


def search(blocks: Tensor, factor: Tensor | None, exponent_bias: int, code: SeedLMCode, exponents: int) -> BlockFits:
    """Find the same least error as `search_reference.search`; of seeds that tie, the first in LFSR order."""
    count = len(blocks)
    if factor is None:
        tables = _plain_tables(code)
    else:
        tables = _Tables(code, np.ascontiguousarray(factor.double().cpu().numpy()))
    w = np.ldexp(blocks.detach().double().numpy(), -exponent_bias)  # float32 bounds must not under- or overflow
    wm = w @ tables.factor
    hw = (wm @ tables.factor.T).astype(np.float32)
    fits = np.zeros((count, 2 + code.rank), np.int64)
    errors = np.empty(count)
    classes = tables.lower.shape[0] * LANES
    bound, slack = _make_bound(code.block, code.rank), _slack(code)
    chunk = max(2, min(CHUNK_BLOCKS, CHUNK_FLOATS // classes, -(-count // thread_count())))
    batch = chunk * thread_count() * JOBS_PER_THREAD
    maxima = np.empty((min(batch, count), classes), np.float32)
    tops = np.empty((len(maxima), tables.lower.shape[0]), np.float32)
    seeds = tables.u, tables.u32, tables.seeds, tables.lower, tables.ill, tables.ill_bases
    for first in range(0, count, batch):
        part = slice(first, min(count, first + batch))
        bound(tables.u32, tables.lower, hw[part], chunk, maxima, tops)
        weights, tuning = (w[part], hw[part], wm[part]), (slack, tables.spread, FINISH_BLOCKS)
        _finish(*seeds, *weights, tables.factor, exponents, *tuning, maxima, tops, fits[part], errors[part])
    result = torch.from_numpy(fits)
    winners = torch.from_numpy(lfsr_cycle(code.seed_bits)[fits[:, 0]].astype(np.int64))
    return BlockFits(winners, result[:, 1], result[:, 2:], torch.from_numpy(np.ldexp(errors, 2 * exponent_bias)))
