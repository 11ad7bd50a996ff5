"""SeedLM's exact search on GPUs: a bound for all seeds on tensor cores, the exact evaluation of the few that it leaves.

As on the CPU, a seed's least-squares error ‖w‖² - ‖Qᵀw‖², with Q an orthonormal basis of U(s), never exceeds its
quantised error. Here Q is a table of float16 and ‖Qᵀw‖² for a tile of seeds and a tile of blocks is P products on tensor
cores, P multiply–adds and a maximum: only the largest of each class of `TILES` seeds is written. Rounding to float16
costs at most `_slack`, so that somewhat more seeds are left: these are bounded once more, then fitted in float64.

Seeds stand in the order of ‖R⁻¹‖, so that the ill-conditioned ones, which a small block cannot rule out, share classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from seedpack.kernels.common import gpu_configs as configs
from seedpack.kernels.seedlm.code import SeedLMCode
from seedpack.kernels.seedlm.search_reference import EXPONENT_MIN, BlockFits, bases, basis_values, quantised
from seedpack.prng import lfsr_cycle

TILES = 16  # seeds of a class
AT_ONCE = 1 << 27  # of the bound's numbers, and of those of the second
NUMBERS_AT_ONCE = 1 << 24  # of bases in float64
FIRST_FITS = 8  # seeds of greatest energy that are fitted before the bar is set: some of them are ill-conditioned
LEAST_MANTISSA = 0.49**2 * 4.0**EXPONENT_MIN


@triton.jit
def energies_kernel(
    q_ptr, w_ptr, tops_ptr, blocks, seeds, classes,
    RANK: tl.constexpr, PLACES: tl.constexpr, TILES: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Store tops [blocks, classes] = max of ‖Qᵀw‖² over the seeds of each class; q [RANK, seeds, PLACES], w [blocks, PLACES]."""
    i_block = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_block = i_block < blocks
    i_place, i_lane = tl.arange(0, PLACES), tl.arange(0, BLOCK_S)
    b_w = tl.load(w_ptr + i_block[None, :] * PLACES + i_place[:, None], m_block[None, :], other=0.0)
    b_top = tl.zeros((BLOCK_S, BLOCK_B), tl.float32)
    for tile in range(TILES):
        i_seed = (tl.program_id(1).to(tl.int64) * TILES + tile) * BLOCK_S + i_lane
        b_energy = tl.zeros((BLOCK_S, BLOCK_B), tl.float32)
        for p in tl.static_range(RANK):
            b_q = tl.load(q_ptr + (p * tl.cast(seeds, tl.int64) + i_seed)[:, None] * PLACES + i_place[None, :])
            b_z = tl.dot(b_q, b_w)
            b_energy += b_z * b_z
        b_top = tl.maximum(b_top, b_energy)
    i_class = tl.program_id(1) * BLOCK_S + i_lane
    tl.store(tops_ptr + i_block[None, :] * classes + i_class[:, None], b_top, m_block[None, :])


def orthonormal(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q [..., C, P], R [..., P, P] of matrices by Gram and Schmidt, twice, and whether they have full rank [...]."""
    q, rank = torch.zeros_like(columns), columns.shape[-1]
    r = columns.new_zeros(*columns.shape[:-2], rank, rank)
    full = torch.ones_like(r[..., 0, 0], dtype=torch.bool)
    for p in range(rank):
        column = columns[..., p]
        size = column.square().sum(-1)
        for _ in range(2):
            dot = (q[..., :p] * column[..., None]).sum(-2)
            r[..., :p, p] += dot
            column = column - (q[..., :p] * dot[..., None, :]).sum(-1)
        norm = column.square().sum(-1)
        good = norm > 1e-24 * size
        full &= good
        r[..., p, p] = torch.where(good, norm.sqrt(), 1)
        q[..., p] = torch.where(good[..., None], column / r[..., p, p, None], 0)
    return q, r, full


def back_substituted(r: Tensor, y: Tensor) -> Tensor:
    """Solve R x = y for upper triangular R [n, P, P] and y [n, P]."""
    x = torch.zeros_like(y)
    for p in range(y.shape[1] - 1, -1, -1):
        x[:, p] = (y[:, p] - (r[:, p, p + 1 :] * x[:, p + 1 :]).sum(1)) / r[:, p, p]
    return x


def largest_energies(q: Tensor, w: Tensor) -> Tensor:
    """Return float32 [blocks, seeds / TILES], see `energies_kernel`; q float16 [P, seeds, places], w float16 [blocks, places]."""
    (rank, seeds, places), classes = q.shape, q.shape[1] // TILES
    tops = torch.empty(len(w), classes, dtype=torch.float32, device=w.device)
    config = configs.seedlm_energies(places, rank)
    grid = (triton.cdiv(len(w), config["BLOCK_B"]), classes // config["BLOCK_S"])
    with configs.current(w.device):
        energies_kernel[grid](q, w, tops, len(w), seeds, classes, RANK=rank, TILES=TILES, **config)
    return tops


def _slack(block: int, rank: int) -> float:
    """Bound the error of ‖Qᵀw‖² for ‖w‖ = 1: of each of the P sums 2^-10 (two roundings to float16), a little, and what
    some AMD processors lose by taking subnormal numbers for zero."""
    of_sum = 1.05 * 2.0**-10 + 2 * math.sqrt(block) * 2.0**-14
    return 2 * math.sqrt(rank) * of_sum + rank * of_sum**2


@dataclass(frozen=True)
class _Tables:
    """The tables of one code and one factor; S seeds, padded to whole classes.

    Attributes:
        code: K, C, P.
        values: of `reference.basis_values`.
        factor: M, float64 [C, C].
        q: float16 [P, S, places], of the seeds in the order of `spread`; zero for padding.
        position: of these seeds in `values`, int64 [S].
        spread: ‖R⁻¹‖² of each, float32 [S]; infinite where U has not full rank.
        lanes: seeds of a tile.
    """

    code: SeedLMCode
    values: Tensor
    factor: Tensor
    q: Tensor
    position: Tensor
    spread: Tensor
    lanes: int

    @property
    def classes(self) -> int:
        return len(self.position) // TILES

    def of_class(self, index: Tensor) -> Tensor:
        """Return the seeds of classes [...]: [..., TILES]."""
        step = torch.arange(TILES, device=index.device) * self.lanes
        return (index // self.lanes * (self.lanes * TILES) + index % self.lanes)[..., None] + step


def _make_tables(code: SeedLMCode, factor: Tensor) -> _Tables:
    device, rank = factor.device, code.rank
    values = basis_values(code).to(device)
    pieces = torch.arange(len(values), device=device).split(max(1, NUMBERS_AT_ONCE // code.states))
    identity = torch.eye(rank, dtype=torch.float64, device=device)

    spreads, columns = [], []
    for piece in pieces:
        q, r, full = orthonormal(factor.mT @ bases(values, piece, code))
        inverse = [back_substituted(r, one.expand(len(piece), rank)) for one in identity]
        spread = torch.stack([column.square().sum(-1) for column in inverse]).sum(0)
        spreads.append(torch.where(full, spread, torch.inf).float())
        columns.append(q.half())
    spread, order = torch.cat(spreads).sort(stable=True)
    config = configs.seedlm_energies(code.block, rank)
    padding = -len(values) % (TILES * config["BLOCK_S"])
    q = torch.zeros(rank, len(values) + padding, config["PLACES"], dtype=torch.float16, device=device)
    q[:, : len(values), : code.block] = torch.cat(columns)[order].permute(2, 0, 1)
    pad = torch.nn.functional.pad
    return _Tables(code, values, factor, q, pad(order, (0, padding)), pad(spread, (0, padding)), config["BLOCK_S"])


@lru_cache(maxsize=4)
def _plain_tables(code: SeedLMCode, device: torch.device) -> _Tables:
    return _make_tables(code, torch.eye(code.block, dtype=torch.float64, device=device))


def search(blocks: Tensor, factor: Tensor | None, exponent_bias: int, code: SeedLMCode, exponents: int) -> BlockFits:
    """Find the same least error as `search_reference.search`; of seeds that tie, the first in LFSR order."""
    count, device = len(blocks), blocks.device
    tables = _plain_tables(code, device) if factor is None else _make_tables(code, factor.to(device, torch.float64))
    w = blocks.detach().double()
    total = (w @ tables.factor).square().sum(1)
    best = BlockFits(  # `seed` is a position until the end
        torch.zeros(count, dtype=torch.int64, device=device),
        torch.full((count,), EXPONENT_MIN, dtype=torch.int64, device=device),
        torch.zeros(count, code.rank, dtype=torch.int64, device=device),
        total.clone(),
    )
    for index in total.nonzero()[:, 0].split(max(1, AT_ONCE // tables.classes)):
        _search(tables, w, total, index, exponent_bias, exponents, best)
    cycle = torch.from_numpy(lfsr_cycle(code.seed_bits).copy()).to(device, torch.int64)
    return best._replace(seed=cycle[best.seed])


def _search(
    tables: _Tables, w: Tensor, total: Tensor, index: Tensor, exponent_bias: int, exponents: int, best: BlockFits
) -> None:
    """Search for blocks `index` [n] of w [blocks, C], none zero; put what is better than in `best` there."""
    rank, _, places = tables.q.shape
    unit = w[index] @ tables.factor / total[index, None].sqrt()
    halves = torch.nn.functional.pad(unit, (0, places - unit.shape[1])).half()
    tops = largest_energies(tables.q, halves)
    room = max(1, AT_ONCE // (TILES * rank * places))
    slack = _slack(unit.shape[1], rank)
    least = LEAST_MANTISSA * 4.0**exponent_bias / total[index]  # mantissas of less all round to zero
    class_spread = tables.spread[tables.of_class(torch.arange(tables.classes, device=w.device))].amax(1)

    def energies(row: Tensor, seed: Tensor) -> Tensor:
        return (tables.q[:, seed].float() * halves[row].float()).sum(-1).square().sum(0)

    def fit(row: Tensor, seed: Tensor) -> None:
        _fit(tables, w, index[row], tables.position[seed], exponent_bias, exponents, best)

    every, first = torch.arange(len(index), device=w.device), min(FIRST_FITS, tables.classes)
    lines = max(1, room // first)
    for rows, greatest in zip(every.split(lines), tops.split(lines), strict=True):
        seeds = tables.of_class(greatest.topk(first, 1).indices).view(-1, TILES)
        rows = rows.repeat_interleave(first)
        energy = energies(rows.repeat_interleave(TILES), seeds.flatten()).view(-1, TILES)
        fit(rows, seeds.gather(1, energy.argmax(1, keepdim=True))[:, 0])
    bar = 1 - best.error[index] / total[index] - slack
    row, top = (tops >= bar.float()[:, None]).nonzero(as_tuple=True)
    left = (tops[row, top] + slack) * class_spread[top] >= least[row]
    for rows, classes in zip(row[left].split(room), top[left].split(room), strict=True):
        rows, seeds = rows.repeat_interleave(TILES), tables.of_class(classes).flatten()
        bar = 1 - best.error[index] / total[index] - slack  # lower than it was
        energy = energies(rows, seeds)
        win = (energy >= bar[rows]) & ((energy + slack) * tables.spread[seeds] >= least[rows])
        fit(rows[win], seeds[win])


def _fit(
    tables: _Tables, w: Tensor, index: Tensor, position: Tensor, exponent_bias: int, exponents: int, best: BlockFits
) -> None:
    """Evaluate exactly pairs of a block and a seed [n]; put the best of each block into `best`."""
    if not len(index):
        return
    u, rooted = bases(tables.values, position, tables.code), w[index] @ tables.factor
    weighted = tables.factor.mT @ u
    q, r, full = orthonormal(weighted)
    t = back_substituted(r, (q * rooted[..., None]).sum(1))
    if not full.all():
        t[~full] = torch.einsum("npc,nc->np", torch.linalg.pinv(weighted[~full]), rooted[~full])
    error, exponent, mantissa = quantised(t, u, w[index], tables.factor, exponent_bias, exponents)
    least = best.error.scatter_reduce(0, index, error, "amin")
    tied = error == least[index]
    first = torch.full_like(best.seed, len(tables.values)).scatter_reduce(0, index[tied], position[tied], "amin")
    won = tied & (position == first[index])
    won &= (error < best.error[index]) | ((error == best.error[index]) & (position < best.seed[index]))
    at = index[won]
    best.seed[at], best.exponent[at], best.mantissa[at] = position[won], exponent[won], mantissa[won]
    best.error[at] = error[won]
