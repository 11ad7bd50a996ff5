"""Basis weights: noise against the generators' definitions, products and gradients of every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seedpack.errors import CodecError
from seedpack.kernels.basis import noise_basis
from seedpack.kernels.basis.decode_reference import noise
from seedpack.kernels.basis.dense_noise import DenseNoise
from seedpack.kernels.basis.linear import basis_linear
from seedpack.prng import philox_words, squirrel5
from tests.helpers.marks import slow
from tests.helpers.products import LIMIT, error

SIZES = [(1, 8, 5, 37, 7), (7, 1, 7, 41, 9), (3, 2, 33, 70, 2**64 - 3)]
LARGE = [(3, 13, 7, 150, 2**40 + 5), (2, 30, 33, 70, 2**64 - 3)]


def test_noise_of_squirrel5() -> None:
    found = noise(torch.tensor([5, 2**32 + 1]), 3, DenseNoise("squirrel5", 11))
    for i, n in enumerate((5, 2**32 + 1)):
        for m in range(3):
            word = int(squirrel5(torch.tensor((n + 198491317 * m) % 2**32), 11))
            signed = word - 2**32 if word >= 2**31 else word
            assert float(found[i, m]) == float(torch.tensor(signed).float() * 2.0**-31)


def test_noise_of_philox() -> None:
    """Bases 0 … 3 of weight n are block n of the seed's stream (M22)."""
    words = philox_words(2**40 + 3, 40).view(10, 4)
    signed = torch.where(words >= 2**31, words - 2**32, words)
    assert torch.equal(noise(torch.arange(10), 4, DenseNoise("philox", 2**40 + 3)), signed.float() * 2.0**-31)
    basis = DenseNoise("philox", 5)
    assert torch.equal(noise(torch.arange(10), 9, basis)[:, :7], noise(torch.arange(10), 7, basis))


@pytest.mark.parametrize("generator", ["philox", "squirrel5"])
def test_noise_is_even(generator: str) -> None:
    values = noise(torch.arange(4000), 16, DenseNoise(generator, 3)).double()
    assert abs(float(values.mean())) < 0.01 and abs(float(values.var()) - 1 / 3) < 0.01
    assert float((torch.corrcoef(values.T) - torch.eye(16)).abs().max()) < 0.08


@pytest.mark.parametrize("generator", ["philox", "squirrel5"])
@pytest.mark.parametrize(("blocks", "count", "rows", "columns", "seed"), [*SIZES, *slow(*LARGE)])
@pytest.mark.parametrize("counts", [(1, 33), *slow(((3, 8),))], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_backends(
    backend: Any, blocks: int, count: int, rows: int, columns: int, seed: int, counts: tuple[int, ...], generator: str,
    poison: None,
) -> None:  # fmt: skip
    coefs = torch.randn(count, blocks).T
    basis = noise_basis(generator, seed)
    single = torch.zeros(blocks, count)
    single[:, count // 2] = 1  # one basis alone: no sum, so the words themselves are compared
    for given, limit in ((coefs, 1e-6), (single, 0.0)):
        exact = basis.dense(given, rows, columns, backend="reference")
        assert error(basis.dense(given, rows, columns, backend=backend), exact.double()) <= limit
    weight = basis.dense(coefs, rows, columns, backend="reference").double()
    for tokens in counts:
        for dtype, limit in LIMIT.items():
            x, grad = torch.randn(columns, tokens).to(dtype).T, torch.randn(tokens, rows).to(dtype)
            found = basis.matmul(x, coefs, rows, backend)
            assert found.dtype == dtype and error(found, x.double() @ weight.T) < limit
            found = basis.matmul_transposed(grad, coefs, columns, backend)
            assert found.dtype == dtype and error(found, grad.double() @ weight) < limit
        exact = basis.grad_coefs(grad.float(), x.float(), blocks, count, "reference").double()
        assert error(basis.grad_coefs(grad, x, blocks, count, backend), exact) < 1e-5


@pytest.mark.parametrize("generator", ["philox", "squirrel5"])
def test_gradient_is_that_of_autograd(generator: str) -> None:
    coefs, x, grad = torch.randn(2, 9, requires_grad=True), torch.randn(4, 21), torch.randn(4, 6)
    index = torch.arange(6 * 21)
    weight = (noise(index, 9, DenseNoise(generator, 5)).view(6, 21, 9) * coefs.repeat_interleave(3, 0)[:, None]).sum(2)
    (x @ weight.T * grad).sum().backward()
    assert coefs.grad is not None
    found = noise_basis(generator, 5).grad_coefs(grad, x, 2, 9)
    torch.testing.assert_close(found, coefs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("generator", ["philox", "squirrel5"])
def test_operator_is_registered_properly(generator: str) -> None:
    x, coefs = torch.randn(2, 3, 21, requires_grad=True), torch.randn(2, 9, requires_grad=True)
    torch.library.opcheck(torch.ops.seedpack.basis_linear.default, (x, coefs, generator, 5, "", 6))
    basis = noise_basis(generator, 5)
    weight = basis.dense(coefs.detach(), 6, 21, backend="reference")
    compiled = torch.compile(lambda x, c: basis_linear(x, c, basis, rows=6).relu(), fullgraph=True, backend="aot_eager")
    y = compiled(x, coefs)
    torch.testing.assert_close(y, (x @ weight.T).relu(), rtol=1e-4, atol=1e-4)
    grad_x, grad_coefs = torch.autograd.grad(y.sum(), (x, coefs))
    active = (y > 0).float().view(6, 6)
    torch.testing.assert_close(grad_x.view(6, 21), active @ weight, rtol=1e-4, atol=1e-4)
    expected = basis.grad_coefs(active, x.detach().view(6, 21), 2, 9)
    torch.testing.assert_close(grad_coefs, expected)


def test_refusals() -> None:
    x, basis = torch.randn(2, 8), noise_basis("philox", 1)
    with pytest.raises(CodecError, match="generator must be one of philox, squirrel5, hadamard, got 'sobol'"):
        noise_basis("sobol", 1)
    with pytest.raises(CodecError, match=r"weight of 3 rows must be \[1 to 3, 1 or more\], got \[4, 4\]"):
        basis.dense(torch.ones(4, 4), 3, 8)
    with pytest.raises(CodecError, match="gradients of 5 tokens, activations of 2"):
        basis.grad_coefs(torch.ones(5, 3), x, 1, 4)
