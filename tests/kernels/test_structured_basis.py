"""Structured bases: against Hadamard matrices and signs written out, frames, keys, and the operator."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from seedpack import keys
from seedpack.errors import CodecError, KeyNeededError
from seedpack.kernels.basis import HADAMARD, noise_basis, structured
from seedpack.kernels.basis.structured import StructuredBasis, width_of
from seedpack.kernels.basis.weight import basis_weight
from seedpack.prng import philox_words
from tests.helpers.marks import slow


def basis_of(seed: int, key: str = "") -> StructuredBasis:
    return StructuredBasis(HADAMARD, seed, key)


SIZES = [(1, 10, 1), (1, 64, 200), (3, 70, 300), (2, 200, 256), (1, 129, 5000)]


@cache
def hadamard_matrix(width: int) -> torch.Tensor:
    h: torch.Tensor = (
        torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(width)] for i in range(width)]) / width**0.5
    )
    assert torch.allclose(h @ h, torch.eye(width), atol=1e-5)
    return h


def written_out(coefs: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """The definition, entry by entry."""
    width = width_of(coefs.shape[1])
    index, h = torch.arange(width), hadamard_matrix(width)
    pieces = -(-size // width)
    out = []
    for block, values in enumerate(coefs):
        parts = []
        for piece in range(pieces):
            start = (block * pieces + piece) * 2 * width
            bits = philox_words(seed, width // 16, start // 32)
            i = torch.arange(2 * width)
            s = 1.0 - 2.0 * (bits[i // 32] >> i % 32 & 1)
            z = torch.zeros(width)
            z[: len(values)] = values
            parts.append(width**0.5 * h @ (s[width:] * (h @ (s[index] * z))))
        out.append(torch.cat(parts)[:size])
    return torch.stack(out)


@pytest.mark.parametrize(("blocks", "count", "size"), SIZES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_definition_and_transpose(backend: Any, blocks: int, count: int, size: int, poison: None) -> None:
    coefs, grad = torch.randn(blocks, count), torch.randn(blocks, size)
    exact = written_out(coefs, size, 7)
    torch.testing.assert_close(basis_of(7).expand(coefs, size, backend), exact, rtol=1e-4, atol=1e-4)
    leaf = coefs.clone().requires_grad_(True)
    (written_out(leaf, size, 7) * grad).sum().backward()
    torch.testing.assert_close(basis_of(7).reduce_blocks(grad, count, backend), leaf.grad, rtol=1e-4, atol=1e-3)


def test_large_ones_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    coefs, grad = torch.randn(3, 100), torch.randn(3, 1000)
    basis = basis_of(3)
    whole = basis.expand(coefs, 1000), basis.reduce_blocks(grad, 100)
    for at_once in (1, 300, 1500):
        monkeypatch.setattr(structured, "WEIGHTS_AT_ONCE", at_once)
        assert torch.equal(basis.expand(coefs, 1000), whole[0])
        torch.testing.assert_close(basis.reduce_blocks(grad, 100), whole[1], rtol=1e-5, atol=1e-3)


def test_bases_are_a_frame_of_nearly_normal_numbers() -> None:
    bases = torch.stack([basis_of(11).expand(row[None], 128 * 40)[0] for row in torch.eye(128)])
    torch.testing.assert_close(bases @ bases.T / bases.shape[1], torch.eye(128), rtol=0, atol=1e-4)
    assert abs(float(bases.mean())) < 0.01
    assert abs(float((bases**4).mean()) - 3) < 0.1  # kurtosis of the normal distribution


@pytest.fixture
def key() -> Iterator[bytes]:
    yield bytes(range(16))
    keys._keys.clear()
    structured.piece_signs.cache_clear()


def test_a_private_key_gives_other_bases(key: bytes) -> None:
    coefs = torch.randn(1, 100)
    check = keys.add_key(key)
    weight = basis_of(7, check).expand(coefs, 5000)
    assert abs(float(torch.corrcoef(torch.stack((weight[0], basis_of(7).expand(coefs, 5000)[0])))[0, 1])) < 0.1
    assert not torch.equal(weight, basis_of(8, check).expand(coefs, 5000))
    torch.testing.assert_close(basis_of(7, check).expand(coefs, 5000, "reference"), weight, rtol=1e-4, atol=1e-4)


def test_keystream_is_that_of_chacha20(key: bytes) -> None:
    """RFC 8439, 2.3.2: the key stream's first block is a known answer; ours is the same function of a derived key."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    check = keys.add_key(key)
    derived = HKDF(SHA256(), 32, salt=None, info=b"seedpack ChaCha20").derive(key)
    nonce = bytes(4) + bytes(4) + (5).to_bytes(8, "little")
    stream = Cipher(algorithms.ChaCha20(derived, nonce), mode=None).encryptor().update(bytes(256))
    words = torch.tensor([int.from_bytes(stream[i : i + 4], "little") for i in range(0, 256, 4)])
    assert torch.equal(keys.keystream_words(check, 5, 64), words)
    assert torch.equal(keys.keystream_words(check, 5, 20, 32), words[32:52])


def test_missing_and_wrong_keys_are_said(key: bytes) -> None:
    with pytest.raises(KeyNeededError, match="no key with check 0123456789abcdef was added"):
        basis_of(1, "0123456789abcdef").expand(torch.ones(1, 5), 10)
    with pytest.raises(KeyNeededError, match=r"private key \(check 0123456789abcdef\), and none is given; pass it by"):
        keys.require_key("0123456789abcdef")
    with keys.use_key(key):
        keys.require_key(keys.add_key(key))
        with pytest.raises(KeyNeededError, match="the key given is another one"):
            keys.require_key("0123456789abcdef")
    with pytest.raises(KeyNeededError, match="none is given"):
        keys.require_key(keys.add_key(key))
    with pytest.raises(KeyNeededError, match="has 16 bytes, got 3 bytes"):
        keys.add_key(b"abc")
    with pytest.raises(CodecError, match="'philox' takes no private key; use 'hadamard'"):
        noise_basis("philox", 1, "0123456789abcdef")


def test_keys_from_files(tmp_path: Any, key: bytes) -> None:
    for name, data in (("raw", key), ("hex", key.hex().encode() + b"\n")):
        (tmp_path / name).write_bytes(data)
        assert keys.read_key(tmp_path / name) == key
    (tmp_path / "short").write_bytes(b"12")
    with pytest.raises(KeyNeededError, match="holds 2 bytes, expected a key of 16 bytes or 32 hexadecimal digits"):
        keys.read_key(tmp_path / "short")
    with pytest.raises(KeyNeededError, match="cannot be read"):
        keys.read_key(tmp_path / "none")


@pytest.mark.parametrize(
    ("generator", "blocks", "rows", "columns"),
    [
        *(
            (generator, *size)
            for generator in ("hadamard", "philox", "squirrel5")
            for size in ((1, 7, 33), (3, 8, 41), (1, 1, 300))
        ),
        ("hadamard", 1, 1, 9000),
        *slow(("philox", 1, 1, 9000), ("squirrel5", 1, 1, 9000)),
    ],
)
def test_weight_operator(generator: str, blocks: int, rows: int, columns: int) -> None:
    coefs = torch.randn(blocks, 9, requires_grad=True)
    basis = noise_basis(generator, 5)
    index = torch.tensor([rows - 1, 0, rows - 1])
    torch.library.opcheck(torch.ops.seedpack.basis_weight.default, (coefs, generator, 5, "", rows, columns, None))
    torch.library.opcheck(torch.ops.seedpack.basis_weight.default, (coefs, generator, 5, "", rows, columns, index))
    exact = basis.dense(coefs.detach(), rows, columns, backend="reference")
    weight = basis_weight(coefs, basis, rows=rows, columns=columns)
    torch.testing.assert_close(weight, exact, rtol=1e-4, atol=1e-4)
    some = basis_weight(coefs, basis, rows=rows, columns=columns, index=index)
    torch.testing.assert_close(some, exact[index], rtol=1e-4, atol=1e-4)
    grad, grad_some = torch.randn(rows, columns), torch.randn(3, columns)
    for found, given in ((weight, grad), (some, grad_some)):
        whole = given if found is weight else torch.zeros(rows, columns).index_add_(0, index, given)
        expected = torch.stack(
            [(basis.dense(unit.view(blocks, 9), rows, columns) * whole).sum() for unit in torch.eye(blocks * 9)]
        )
        (grad_coefs,) = torch.autograd.grad(found, coefs, given)
        torch.testing.assert_close(grad_coefs.flatten(), expected, rtol=1e-3, atol=1e-2)
        for backend in ("reference",) if generator == "hadamard" else ("reference", "triton"):
            reduced = basis.reduce(whole, blocks, 9, rows, backend=backend)  # type: ignore[arg-type]
            torch.testing.assert_close(reduced, grad_coefs, rtol=1e-3, atol=1e-2)
