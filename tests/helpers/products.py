"""What the tests of fused products share: random packed weights, and one fixed limit of error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seedpack.codecs.base import Codec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.dtypes import TORCH_DTYPES
from seedpack.kernels.common.bits import pack
from seedpack.kernels.common.row_tiles import Product
from seedpack.kernels.rotation import mix
from seedpack.kernels.seedlm.code import SeedLMCode, SeedLMParts
from seedpack.kernels.seedlm.decode import seedlm_decode
from seedpack.kernels.seedlm.matmul import seedlm_matmul, seedlm_matmul_transposed
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode import trellis_dense
from seedpack.kernels.trellis.matmul import trellis_matmul, trellis_matmul_transposed
from seedpack.kernels.trellis.matmul_reference import rounded

LIMIT = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # ‖found - exact‖ / ‖exact‖


@dataclass(frozen=True)
class Weight:
    """A packed weight and its three operations."""

    rows: int
    columns: int
    dense: Callable[[str], Tensor]
    matmul: Callable[[Tensor, torch.dtype, str], Tensor]
    transposed: Callable[[Tensor, torch.dtype, str], Tensor]


def trellis(
    code_bits: float, state_bits: int, rows: int, columns: int, device: str = "cpu", tail_biting: bool = True, weights: int = 1
) -> Weight:  # fmt: skip
    code = TrellisCode(code_bits, state_bits, 0xDEADBEEF, tail_biting, weights)
    stream = torch.randint(0, 256, code.stream_shape(rows, columns), dtype=torch.uint8).to(device)
    scale = (torch.rand(rows) + 0.5).to(device)
    return Weight(
        rows, columns,
        lambda backend: trellis_dense(stream, scale, code, columns=columns, backend=backend),  # type: ignore[arg-type]
        lambda x, dtype, backend: trellis_matmul(x, stream, scale, code, dtype=dtype, backend=backend),  # type: ignore[arg-type]
        lambda g, dtype, backend: trellis_matmul_transposed(
            g, stream, scale, code, columns=columns, dtype=dtype, backend=backend  # type: ignore[arg-type]
        ),
    )  # fmt: skip


def seedlm(seed_bits: int, block: int, rank: int, rows: int, columns: int, device: str = "cpu") -> Weight:
    blocks = -(-columns // block)
    codes = torch.randint(-8, 8, (rows, blocks * (rank + 1) + blocks * (rank + 1) % 2))
    seeds, bias = pack(torch.randint(1, 2**seed_bits, (rows, blocks)), seed_bits), torch.tensor([-9], dtype=torch.int8)
    parts = SeedLMParts(seeds.to(device), pack(codes, 4).to(device), bias.to(device))
    code = SeedLMCode(seed_bits, block, rank)
    return Weight(
        rows, columns,
        lambda backend: seedlm_decode(parts, code, columns=columns, dtype=torch.float32, backend=backend),  # type: ignore[arg-type]
        lambda x, dtype, backend: seedlm_matmul(x.to(dtype), parts, code, backend=backend),  # type: ignore[arg-type]
        lambda g, dtype, backend: seedlm_matmul_transposed(
            g.to(dtype), parts, code, columns=columns, backend=backend  # type: ignore[arg-type]
        ),
    )  # fmt: skip


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@dataclass(frozen=True)
class FewTokens:
    """A packed layer's prepared product, with all that it comes from."""

    codec: Codec
    parts: dict[str, Tensor]
    shape: tuple[int, int]
    bias: Tensor | None
    product: Product

    def expected(self, x: Tensor, bits: int | None = None) -> Tensor:
        """Return the product in float64, of activations rounded to 8 bits, or of those as they are."""
        columns = self.shape[1]
        if not isinstance(self.codec, TrellisCodec):
            return self.codec.matmul(x.double(), self.parts, self.shape, self.bias, "reference")
        scale, factor = self.codec._prepared_scales(self.parts, columns)
        mixed = mix(x.float(), factor)
        mixed = rounded(mixed, self.codec.weights_per_window) if bits == 8 else mixed
        dense = trellis_dense(self.parts["weight"], scale, self.codec.code, columns=columns, backend="reference")
        y = mixed.double() @ dense.double().T
        return y if self.bias is None else y + self.bias.double()


def few_tokens(
    code_bits: float, state_bits: int, rows: int, columns: int, tail_biting: bool = True, bias: bool = True, planes: int = 1,
    weights: int = 1,
) -> FewTokens:  # fmt: skip
    codec = TrellisCodec(code_bits, state_bits, circular=tail_biting, weights_per_window=weights)
    shape = rows, columns
    parts = {}
    for name, (dtype, part_shape) in codec.parts(shape).items():
        parts[name] = torch.randint(0, 100, part_shape).to(TORCH_DTYPES[dtype])
    parts["scales"] = (torch.rand(rows) + 0.5).half().view(torch.int16)
    added = torch.randn(rows) if bias else None
    product = codec.prepare(parts, shape, added, planes)
    assert product is not None
    return FewTokens(codec, parts, shape, added, product)


def few_tokens_of_seedlm(codec: SeedLMCodec, rows: int, columns: int, planes: int) -> FewTokens:
    blocks, added = -(-columns // codec.block), torch.randn(rows)
    seeds = pack(torch.randint(1, 2**codec.seed_bits, (rows, blocks)), codec.seed_bits)
    codes = codec._pack_codes(torch.randint(-8, 8, (rows, blocks, codec.rank + 1)))
    parts = {"weight": seeds, "codes": codes, "exponent_bias": torch.tensor([-9], dtype=torch.int8)}
    product = codec.prepare(parts, (rows, columns), added, planes)
    assert product is not None
    return FewTokens(codec, parts, (rows, columns), added, product)
