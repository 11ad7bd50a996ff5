"""Randomized SVD, singular values, effective rank, and the error feedback of LDLQ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from seedpack._shapes import Float
from seedpack.errors import CodecError
from seedpack.prng import rademacher


@contextmanager
def fixed_order() -> Iterator[None]:
    """Have torch's CPU work on one thread: how sums are split, and so their last bits, would follow from the count of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def randomized_svd(
    matrix: Float[Tensor, "m n"],
    rank: int,
    *,
    oversampling: int | None = None,
    power_iterations: int = 2,
    seed: int = 0,
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """Return the `rank` leading singular triplets, approximately (Halko, Martinsson and Tropp 2011, Alg. 4.4 and 5.1).

    The test matrix is ±1 from Philox, so a run can be repeated on any device.

    Args:
        matrix: float32 or float64 [m, n].
        rank: triplets wanted, at most min(m, n).
        oversampling: further columns of the test matrix; None is 10 + rank / 4, with which two power iterations come
            within about 1% of the optimal error on the weights of language models (docs/benchmarks/svd.md).
        power_iterations: each multiplies by A·Aᵀ once more, with orthonormalisation between.
        seed: of the test matrix.

    Returns:
        U [m, rank], S [rank] in descending order, Vh [rank, n]; the sign of each pair is fixed so that the
        largest entry of a row of Vh is positive.
    """
    m, n = matrix.shape
    if not 1 <= rank <= min(m, n):
        raise CodecError(f"rank {rank} of a {m}x{n} matrix: must be 1 to {min(m, n)}")
    width = min(rank + (10 + rank // 4 if oversampling is None else oversampling), m, n)
    q = matrix @ rademacher(seed, n, width, matrix.device).to(matrix.dtype)
    for _ in range(power_iterations):
        q = torch.linalg.qr(q).Q
        q = matrix @ torch.linalg.qr(matrix.mT @ q).Q
    q = torch.linalg.qr(q).Q
    u, s, vh = torch.linalg.svd(q.mT @ matrix, full_matrices=False)
    u, s, vh = q @ u[:, :rank], s[:rank], vh[:rank]
    pivot = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
    return u * pivot.mT, s, vh * pivot


def singular_values(matrix: Float[Tensor, "m n"]) -> Float[Tensor, " k"]:
    """Return all singular values in descending order, float64 [min(m, n)], by the Gram matrix of the smaller side.

    Those below 1e-8 of the largest drown in rounding; sums of squares and entropies do not notice.
    """
    matrix = matrix.double()
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp_min(0).sqrt().flip(0)


def effective_rank(values: Float[Tensor, " k"]) -> float:
    """Return exp of the Shannon entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007).

    >>> round(effective_rank(torch.ones(5)), 6), round(effective_rank(torch.tensor([1.0, 0.0])), 6)
    (5.0, 1.0)
    """
    total = values.sum()
    if total == 0:
        return 0.0
    p = values.double() / total
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def captured_energy(values: Float[Tensor, " k"], rank: int) -> float:
    """Return the share of ‖W‖² that the best approximation of a rank holds (Eckart and Young)."""
    energy = values.double().square()
    return float(energy[:rank].sum() / energy.sum()) if energy.sum() > 0 else 1.0


def ldlq_correction(errors: Tensor, factor: Tensor, low: int, high: int, decided: int) -> Float[Tensor, "m block"]:
    """Return by how much columns low … high - 1 should fall short to compensate for the errors of those from `decided` on.

    With the error's cost ‖E·C‖², C lower triangular, the columns' own part of it is least then (LDLQ, Chee et al., arXiv
    2307.13304, blockwise): E·C[decided:, block]·C[block, block]⁻¹.

    Args:
        errors: E, float64 [m, n].
        factor: C, float64 [n, n].
        low: first column of the block.
        high: behind its last.
        decided: first of the columns whose errors stand; at least `high`.
    """
    carried = errors[:, decided:] @ factor[decided:, low:high]
    correction: Tensor = torch.linalg.solve_triangular(factor[low:high, low:high], carried, upper=False, left=False)
    return correction
