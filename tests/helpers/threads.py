"""Kernels used from threads and from forked processes: `python -m tests.helpers.threads CASE` prints what came out.

A process of its own, as what fails ends or blocks the process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable

import numba
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from seedpack.codecs.base import Codec
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.kernels.basis import matmul_cpu
from seedpack.kernels.basis.dense_noise import DenseNoise
from seedpack.kernels.common import jit
from seedpack.loader.layers import pack_module_

ROWS, COLUMNS, THREADS = 200, 72, 4
CODECS: tuple[Codec, ...] = (
    TrellisCodec(3, 9, effort="fast"), SeedLMCodec(8, 8, 3),
    BasisCodec(count=5, generator="philox"), BasisCodec(count=6, generator="squirrel5"),
)  # fmt: skip


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    weights = torch.randn(ROWS, COLUMNS)
    dense = [nn.Linear(COLUMNS, ROWS) for _ in CODECS]
    return [pack_module_(layer, codec, codec.encode(weights)) for layer, codec in zip(dense, CODECS, strict=True)]


def products(nets: list[nn.Module]) -> list[Tensor]:
    """Multiply few tokens, which kernels do."""
    inputs = [torch.linspace(-1, 1, tokens * COLUMNS).view(tokens, COLUMNS) for tokens in (1, 3, 8)]
    with torch.no_grad():
        return [net(x) for net in nets for x in inputs]


def encoded() -> list[Tensor]:
    return [
        part
        for codec in CODECS
        for part in codec.encode(torch.linspace(-1, 1, 20 * COLUMNS).view(20, COLUMNS)).values()
    ]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def near(one: list[Tensor], other: list[Tensor]) -> bool:
    """Return whether products are the same but for the order of BLAS's sums, which goes by its threads on some processors."""
    return len(one) == len(other) > 0 and all(torch.allclose(a, b, 1e-5, 1e-6) for a, b in zip(one, other, strict=True))


def in_child(check: Callable[[], object]) -> str:
    """Return what a check says in a forked child, or the signal that ended it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, str(check()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    return f"{text} {os.waitpid(child, 0)[1]}"


class Products(Dataset[list[Tensor]]):
    def __init__(self, nets: list[nn.Module]):
        self.nets = nets

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[Tensor]:
        return products(self.nets)


def fork() -> str:
    """Fork before the first call, when torch's threads have started alone, then after it: by hand, and a child of that child; a DataLoader's workers; and a pool's."""
    x, coefs, basis = torch.ones(1, COLUMNS), torch.ones(ROWS, 5), DenseNoise("philox", 1)
    torch.randn(1500, 1500).exp().sum()  # in threads, which a child would wait for
    early = in_child(lambda: (matmul_cpu.matmul(x, coefs, basis, ROWS).shape == (1, ROWS), jit._mode.name))
    nets = layers()
    expected = products(nets)

    def check() -> tuple[bool, int, int]:
        return near(products(nets), expected), jit.thread_count(), torch.get_num_threads()

    late = in_child(lambda: (check(), in_child(check)))
    loaded = list(DataLoader(Products(nets), batch_size=None, num_workers=2, multiprocessing_context="fork"))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        loaded += pool.map(Products(nets).__getitem__, range(2))
    return f"{early} {late} {[near(result, expected) for result in loaded]}"


def region() -> str:
    """Fork after a product of few tokens has run on torch's own threads, and Numba's have not started."""
    net = layers()[0]
    large = pack_module_(nn.Linear(576, 600), CODECS[0], None)
    for part in large.packed_parts().values():
        part.fill_(1) if type(part) is Tensor else part.data.as_subclass(Tensor).fill_(1)
    x = torch.linspace(-1, 1, 576)[None]
    torch.set_num_threads(2)
    with torch.no_grad():
        expected = large(x)

        def check() -> tuple[bool, bool, int]:
            torch.randn(1500, 1500).exp().sum()
            with torch.no_grad():
                return torch.equal(large(x), expected), net(x[:, :COLUMNS]).shape == (1, ROWS), torch.get_num_threads()

        return in_child(check)


def encode() -> str:
    expected = encoded()
    return in_child(lambda: (same(encoded(), expected), jit.thread_count()))


def threads() -> str:
    """Multiply in several threads at once, from the first call on."""
    nets = layers()
    results: list[list[Tensor]] = []
    gate = threading.Barrier(THREADS)

    def work() -> None:
        gate.wait()
        for _ in range(50):
            results.append(products(nets))

    started = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    layer = numba.threading_layer()  # type: ignore[attr-defined]
    return f"{all(same(result, results[0]) for result in results)} {len(results)} {layer} {jit._mode.name}"


if __name__ == "__main__":
    print({f.__name__: f for f in (fork, region, encode, threads)}[sys.argv[1]]())
