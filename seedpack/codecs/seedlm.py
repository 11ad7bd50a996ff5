"""The SeedLM codec: a seed and P 4-bit coefficients per block of C weights.

Shafipour et al., arXiv 2410.10714, ICLR 2025.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from seedpack._shapes import Float
from seedpack.codecs.base import Codec, Parts, Progress, Shape, require_whole
from seedpack.codecs.importance import Importance, ImportanceLike
from seedpack.codecs.interfaces import HessianFitting
from seedpack.codecs.names import require_bits
from seedpack.errors import CodecError
from seedpack.formats import PartSpec
from seedpack.kernels.common.bits import pack, packed_shape, unpack
from seedpack.kernels.common.row_tiles import Product
from seedpack.kernels.dispatch import Backend
from seedpack.kernels.seedlm.code import CODE_BITS, SeedLMCode, SeedLMParts
from seedpack.kernels.seedlm.decode import seedlm_decode
from seedpack.kernels.seedlm.matmul import seedlm_matmul, seedlm_matmul_transposed, seedlm_prepare
from seedpack.kernels.seedlm.search import seedlm_search
from seedpack.linalg import ldlq_correction

# The rule for a tensor's bias keeps every exponent, -8 … 7 with the bias added, a normal float32.
BIAS_MIN, BIAS_MAX = -118, 120
BATCH_BLOCKS = 1 << 15
UNCOMPILED = (
    1 << 18
)  # weights that plain torch rebuilds in some milliseconds; a kernel takes seconds to compile for each K, C, P
TABLE_BITS = 20  # K up to which plain torch has its tables in a fraction of a second
COMPILING = 200_000_000  # what that takes else, as `Codec.decoding_cost` counts it: 4 s


@dataclass(frozen=True)
class SeedLMCodec(Codec, HessianFitting):
    """Each block of C weights of a row is U(s)·(q·2^(e + bias)): 16 + 4 + 12 bits for 8 weights by default.

    A block costs K + 4 + 4P bits (Eq. 3); (K, C, P) = (16, 8, 3) is 4.000 and (16, 12, 4) is 3.000 bits per
    weight (Table 1). Rows are padded to whole blocks. Parts (bit fields, see docs/format.md):

    - weight: the seeds, K bits each, uint8 [out, groups, bytes].
    - codes: for each block the exponent, then P mantissas, 4 bits each in two's complement, uint8 [out, groups, bytes].
    - exponent_bias: one int8 for the tensor, so that small and large tensors fit the 4-bit exponent.

    Attributes:
        seed_bits: K, 2 … 24.
        block: C, weights of a block.
        rank: P, coefficients of a block.
        exponents: exponents tried for each seed, for the encoder alone: 1 is the paper's rule, 3 its neighbours too.
    """

    id: ClassVar[str] = "seedlm"
    version: ClassVar[int] = 0
    summary: ClassVar[str] = "a seed and 4-bit coefficients per block of weights (SeedLM)"
    seed_bits: int = 16
    block: int = 8
    rank: int = 3
    exponents: int = 3

    def __post_init__(self) -> None:
        require_whole(self.id, "seed_bits", self.seed_bits, 2, 24)
        require_whole(self.id, "block", self.block, 1, 256)
        require_whole(self.id, "rank", self.rank, 1, min(16, self.block))
        if type(self.exponents) is not int or self.exponents not in (1, 3):
            raise CodecError(f"{self.id}: exponents must be 1 or 3, got {self.exponents!r}")

    @classmethod
    def from_bits(cls, bits: float, **settings: Any) -> SeedLMCodec:
        """Return the paper's configuration of 3 or 4 bits (Table 1)."""
        require_bits(cls.id, bits)
        seed_bits, block, rank = {4.0: (16, 8, 3), 3.0: (16, 12, 4)}[bits]
        return cls(**{"seed_bits": seed_bits, "block": block, "rank": rank} | settings)

    def parts(self, shape: Shape) -> dict[str, PartSpec]:
        """Return seeds, codes and the exponent bias."""
        rows, columns = shape
        blocks = -(-columns // self.block)
        return {
            "weight": ("U8", packed_shape(rows, blocks, self.seed_bits)),
            "codes": ("U8", packed_shape(rows, blocks, CODE_BITS * (self.rank + 1))),
            "exponent_bias": ("I8", (1,)),
        }

    def encode(
        self,
        weight: Float[Tensor, "out in"],
        importance: ImportanceLike = None,
        *,
        progress: Progress | None = None,
        backend: Backend = "auto",
    ) -> Parts:
        """Search all seeds, exponents and rounded coefficients exactly (see `kernels.seedlm.search`).

        With a Hessian (LDLQ), blocks are fitted from the last to the first: each is moved to compensate for the errors of
        those before, and fitted under the norm that its own errors have once the blocks to come compensate for them.
        """
        (rows, columns), device = weight.shape, weight.device
        importance = Importance.of(importance).require(self.id, columns)
        blocks, padding = -(-columns // self.block), -columns % self.block
        step = max(1, BATCH_BLOCKS // blocks)
        bias = self._exponent_bias(map(self._blocks, weight.split(step)))
        seeds = torch.empty(rows, blocks, dtype=torch.int32, device=device)
        codes = torch.empty(rows, blocks, self.rank + 1, dtype=torch.int8, device=device)

        def fit(where: tuple[slice, slice], part: Tensor, factor: Tensor | None) -> None:
            best = seedlm_search(
                part.reshape(-1, self.block), factor, bias, self.code, exponents=self.exponents, backend=backend
            )
            seeds[where] = best.seed.view(part.shape[:2])
            codes[where] = torch.cat((best.exponent[:, None], best.mantissa), 1).view(*part.shape[:2], -1)
            if progress:
                progress(part.shape[0] * (min(columns, where[1].stop * self.block) - where[1].start * self.block))

        if importance.is_none:
            for row in range(0, rows, step):
                here = slice(row, min(rows, row + step)), slice(0, blocks)
                fit(here, self._blocks(weight[here[0]]), None)
        elif importance.has_hessian:
            c = importance.cholesky(device, padding)
            targets = self._blocks(weight).flatten(1).double()
            errors = torch.zeros_like(targets)
            for block in reversed(range(blocks)):
                low, high = block * self.block, (block + 1) * self.block
                factor, here = c[low:high, low:high], (slice(0, rows), slice(block, block + 1))
                fit(here, (targets[:, low:high] - ldlq_correction(errors, c, low, high, high))[:, None], factor)
                errors[:, low:high] = self._values(seeds[here], codes[here], bias, backend) - targets[:, low:high]
        else:
            weights = torch.nn.functional.pad(importance.channel_weights(), (0, padding), value=1.0)
            for block, h in enumerate(weights.view(blocks, self.block)):
                here = slice(0, rows), slice(block, block + 1)
                part = weight[:, block * self.block : (block + 1) * self.block]
                fit(here, self._blocks(part), torch.diag(h.sqrt()))
        return {
            "weight": pack(seeds, self.seed_bits),
            "codes": self._pack_codes(codes),
            "exponent_bias": torch.tensor([bias], dtype=torch.int8, device=device),
        }

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype, backend: Backend = "auto") -> Tensor:
        """Multiply each block's matrix by its coefficients; see `kernels.seedlm.decode_reference`, the definition."""
        if (
            backend == "auto"
            and parts["weight"].is_cpu
            and self.seed_bits <= TABLE_BITS
            and math.prod(shape) <= UNCOMPILED
        ):
            backend = "reference"
        return self._decode(parts, shape, dtype, backend)

    def decode_rows(
        self, parts: Parts, index: Tensor, shape: Shape, dtype: torch.dtype, backend: Backend = "auto"
    ) -> Tensor:
        """Rebuild some rows, which is done again and again."""
        return self._decode(self.rows(parts, index), (len(index), shape[1]), dtype, backend)

    def _decode(self, parts: Parts, shape: Shape, dtype: torch.dtype, backend: Backend) -> Tensor:
        return seedlm_decode(self._packed(parts), self.code, columns=shape[1], dtype=dtype, backend=backend)

    def prepare(self, parts: Parts, shape: Shape, bias: Tensor | None, planes: int) -> Product | None:
        """Prepare the product of few tokens on the CPU: activations are rounded and multiplied with the states' bytes."""
        kept = [parts["exponent_bias"]]
        return seedlm_prepare(self._packed(parts), self.code, columns=shape[1], bias=bias, planes=planes, kept=kept)

    def _product(self, x: Tensor, parts: Parts, shape: Shape, backend: Backend) -> Tensor:
        return seedlm_matmul(x, self._packed(parts), self.code, backend=backend)

    def _product_transposed(self, grad: Tensor, parts: Parts, shape: Shape, backend: Backend) -> Tensor:
        return seedlm_matmul_transposed(grad, self._packed(parts), self.code, columns=shape[1], backend=backend)

    def decoding_cost(self, shape: Shape) -> int:
        """Return the matrix, twice, and for wide seeds the time to compile; of blocks that the kernels do not take, the work of the
        reference and the register's cycle."""
        if self.code.unable["cpu"] is None:
            return super().decoding_cost(shape) + (COMPILING if self.seed_bits > TABLE_BITS else 0)
        return 25 * math.prod(shape) + (20 << self.seed_bits)

    def rows(self, parts: Parts, index: Tensor) -> Parts:
        """Return seeds and codes of some rows, and the bias of all."""
        return {**parts, "weight": parts["weight"][index], "codes": parts["codes"][index]}

    def check(self, parts: Mapping[str, Tensor], shape: Shape) -> None:
        """Check the parts' form, that no seed is 0, and that the bias is in range."""
        super().check(parts, shape)
        if parts["weight"].device.type == "meta":
            return
        if not BIAS_MIN <= int(parts["exponent_bias"]) <= BIAS_MAX:
            raise CodecError(
                f"{self.id}: exponent bias {int(parts['exponent_bias'])} is not in {BIAS_MIN} … {BIAS_MAX}"
            )
        blocks = -(-shape[1] // self.block)
        rows = max(1, BATCH_BLOCKS // blocks)
        if not all(bool(unpack(part, blocks, self.seed_bits).all()) for part in parts["weight"].split(rows)):
            raise CodecError(f"{self.id}: a seed is 0, a state that the LFSR never leaves; the file is corrupt")

    @property
    def row_by_row(self) -> bool:
        """True: beyond its row, a block's parts follow only from the one exponent bias."""
        return True

    @cached_property
    def code(self) -> SeedLMCode:
        """K, C and P, as kernels take them."""
        return SeedLMCode(self.seed_bits, self.block, self.rank)

    @staticmethod
    def _packed(parts: Parts) -> SeedLMParts:
        return SeedLMParts(parts["weight"], parts["codes"], parts["exponent_bias"])

    def _pack_codes(self, codes: Tensor) -> Tensor:
        """Pack codes [rows, blocks, P + 1] into bytes, whole groups of blocks."""
        rows, blocks, width = codes.shape
        shape = packed_shape(rows, blocks, CODE_BITS * width)
        nibbles = torch.zeros(rows, shape[1] * shape[2] * 2, dtype=torch.int8, device=codes.device)
        nibbles[:, : blocks * width] = codes.flatten(1)
        return pack(nibbles, CODE_BITS).reshape(shape)

    def _values(self, seeds: Tensor, codes: Tensor, bias: int, backend: Backend) -> Tensor:
        """Return the weights [rows, C] of one block per row."""
        biases = torch.tensor([bias], dtype=torch.int8, device=seeds.device)
        parts = SeedLMParts(pack(seeds, self.seed_bits), self._pack_codes(codes), biases)
        return seedlm_decode(parts, self.code, columns=self.block, dtype=torch.float32, backend=backend).double()

    def _blocks(self, weight: Tensor) -> Tensor:
        """Return the blocks of some columns [rows, blocks, C], float32; zeros fill the last one."""
        padded = torch.nn.functional.pad(weight.detach().float(), (0, -weight.shape[1] % self.block))
        return padded.reshape(len(weight), -1, self.block)

    @staticmethod
    def _exponent_bias(batches: Iterable[Tensor]) -> int:
        """Return the bias that puts the largest block's exponent near the top of the range, an octave to spare."""
        norm = max(float(torch.linalg.vector_norm(batch.double(), dim=-1).max()) for batch in batches)
        top = math.frexp(norm / 7.5)[1] + 1 if norm > 0 else 0
        return min(max(top - 7, BIAS_MIN), BIAS_MAX)
