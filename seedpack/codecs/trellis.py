"""The trellis codec: overlapping seeds. Every L-bit window of a row's bit stream is the seed of one weight, or of two.

Trellis-coded quantisation (Marcellin and Fischer, 1990) on the bit-shift trellis with a computed code, as QTIP (Tseng et
al., arXiv 2406.11235, NeurIPS 2024) has it, after a random rotation of the input side; docs/codecs/trellis.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from seedpack._shapes import Float
from seedpack.codecs.base import Codec, Parts, Progress, Shape, require_whole
from seedpack.codecs.derived import derived
from seedpack.codecs.importance import Importance, ImportanceLike
from seedpack.codecs.interfaces import HessianFitting, Rates, RowScaling
from seedpack.codecs.names import require_bits
from seedpack.codecs.trellis_balance import channel_scaling
from seedpack.codecs.trellis_effort import (
    EFFORTS,
    RATES,
    USUAL,
    code_unit,
    distortion,
    least_state_bits,
    rate,
    survivors,
    target_spread,
    usual_multiplier,
    usual_weights,
)
from seedpack.errors import CodecError
from seedpack.formats import CodecSpec, PartSpec
from seedpack.kernels.common.bits import pack, packed_shape
from seedpack.kernels.common.row_tiles import Product
from seedpack.kernels.dispatch import Backend
from seedpack.kernels.rotation import mix, rotate, signs, unrotate
from seedpack.kernels.trellis.bytes import bytes_are_faster, trellis_byte_linear
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.decode import trellis_decode, trellis_dense
from seedpack.kernels.trellis.matmul import trellis_linear, trellis_matmul_transposed, trellis_prepare
from seedpack.kernels.trellis.scales import trellis_scales
from seedpack.kernels.trellis.scales_reference import BALANCE_BITS, VALUE_UNIT, input_scales, row_scales
from seedpack.kernels.trellis.search import trellis_search
from seedpack.prng import trellis_key

WEIGHTS_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 24}
ROWS_AT_ONCE = {"cpu": 1, "cuda": 2048}  # a GPU searches as many side by side
EXPONENT_MIN, EXPONENT_MAX = -100, 100
BALANCE_ROWS = 128  # from so many rows on, 4 bits per input channel are cheap enough to pay


@dataclass(frozen=True)
class TrellisCodec(Codec, Rates, HessianFitting, RowScaling):
    """Weight t of a row is value(bits [V·k·s, V·k·s + L) of the row's tail-biting stream)·scale, s = ⌊t / V⌋, in the rotated
    basis.

    It takes k bits per weight, 16 per row, and for weights of 128 rows or more 4 per input channel. Parts:

    - weight: the streams, k bits per weight, uint8 [out, groups, bytes] (bit fields; rows padded to whole bytes).
    - scales: float16 bit patterns, int16 [out].
    - exponent: one int8 for the tensor, a power of two on all scales, so that small and large tensors fit float16.
    - balance: with 128 rows or more, per-channel scaling. Four bits q per input channel, uint8 [1, groups, bytes]: the
      channel's weights are multiplied by 2^((q - 8) / 4) before the rotation, so that errors fall where they cost least.

    Attributes:
        code_bits: k, 1 … 8, or with V = 2 also 1.5, 2.5 and 3.5.
        state_bits: L, from V·k + 4 and 2·V·k to 20; default 16, for effort "best" 18 and, with V = 2, 20.
        seed: of the code and of the rotation's signs. Layers that share an input share the rotation if they share it.
        effort: "fast", "default" or "best", for the encoder alone.
        balance: whether weights of 128 rows or more have that part; it pays where input channels differ.
        circular: whether streams are tail-biting. If not, they end in zeros: then a row's first weights cost a little
            more error, but its last ones can compensate for the errors of all others, so that importance can be a Hessian.
        weights_per_window: V, 1, or 2 for k up to 3.5, which are multiplied nearly twice as fast. Default 2 up to
            k = 3, where that costs at most 0.21 dB, for effort "best" up to k = 2.
        multiplier: a, which mixes the bits of a window: odd, of 32 bits. 0 is that of the format's table (M24); default the best
            that is known for the search.
    """

    id: ClassVar[str] = "trellis"
    version: ClassVar[int] = 3
    older: ClassVar[frozenset[int]] = frozenset([0, 1, 2])
    summary: ClassVar[str] = "trellis-coded quantisation with overlapping seeds, the default"
    uses_norm_heuristic: ClassVar[bool] = True
    int8_activations: ClassVar[bool] = True
    code_bits: int | float = 4
    state_bits: int = 0
    seed: int = 0
    effort: str = "default"
    balance: bool = True
    circular: bool = True
    weights_per_window: int = 0
    multiplier: int = USUAL

    def __post_init__(self) -> None:
        if not isinstance(self.effort, str) or self.effort not in EFFORTS:
            raise CodecError(f"{self.id}: effort must be one of {', '.join(EFFORTS)}, got {self.effort!r}")
        object.__setattr__(self, "code_bits", rate(self.id, self.code_bits))
        if type(self.weights_per_window) is int and self.weights_per_window == 0:
            object.__setattr__(self, "weights_per_window", usual_weights(self.effort, self.code_bits, self.state_bits))
        fitting = [weights for weights, rates in RATES.items() if self.code_bits in rates]
        require_whole(self.id, "weights_per_window", self.weights_per_window, fitting[0], fitting[-1])
        if type(self.state_bits) is int and self.state_bits == 0:
            object.__setattr__(self, "state_bits", EFFORTS[self.effort].state_bits[self.weights_per_window - 1])
        least = least_state_bits(int(self.weights_per_window * self.code_bits))
        require_whole(self.id, "state_bits", self.state_bits, least, 20)
        for name in ("balance", "circular"):
            if type(getattr(self, name)) is not bool:
                raise CodecError(f"{self.id}: {name} must be true or false, got {getattr(self, name)!r}")
        require_whole(self.id, "seed", self.seed, 0, 2**63 - 1)
        if type(self.multiplier) is int and self.multiplier == USUAL:
            object.__setattr__(self, "multiplier", self._usual_multiplier)
        require_whole(self.id, "multiplier", self.multiplier, 0, 2**32 - 1)
        if self.multiplier and self.multiplier % 2 == 0:
            raise CodecError(f"{self.id}: multiplier must be odd, or 0, got {self.multiplier}")

    @property
    def _usual_multiplier(self) -> int:
        return usual_multiplier(self.effort, self.weights_per_window, self.code_bits, self.state_bits)

    @property
    def rate(self) -> int | float:
        """The code bits, k."""
        return self.code_bits

    @classmethod
    def from_bits(cls, bits: float, **settings: Any) -> TrellisCodec:
        """Return the codec of the whole bits; a plan spreads the fraction beyond over tensors."""
        require_bits(cls.id, bits)
        return cls(**{"code_bits": int(bits)} | settings)

    def variants(self) -> list[TrellisCodec]:
        """Return the codecs of all rates, with what is usual for each where it is for this one."""
        own, usual = self.weights_per_window, usual_weights(self.effort, self.code_bits)
        state_bits = 0 if self.state_bits == EFFORTS[self.effort].state_bits[own - 1] else self.state_bits
        multiplier = USUAL if self.multiplier == self._usual_multiplier else self.multiplier
        codecs = []
        for k in sorted({*RATES[1], *RATES[2]} if own == 2 or own == usual else RATES[1]):
            weights = 0 if own == usual or k not in RATES[own] else own
            bits = state_bits and max(state_bits, least_state_bits(int(k * (weights or 1 + (k not in RATES[1])))))
            codecs.append(
                replace(self, code_bits=k, weights_per_window=weights, state_bits=bits, multiplier=multiplier)
            )
        return codecs

    @property
    def row_by_row(self) -> bool:
        """True."""
        return True

    @property
    def int8_by_default(self) -> bool:
        """True for at most 4 bits per weight: at 4 it adds 0.9% to the error, at 5 four times as much."""
        return self.code_bits <= 4

    def rounds_many(self, x: Tensor) -> bool:
        """Return whether bytes are multiplied faster, for at most 3 bits per weight: at 3 they add 0.6% to the error. At 4, even
        with activations of 16 bits, it is 1.1%, and 1.5% of the KL divergence."""
        return self.code_bits <= 3 and bytes_are_faster(x)

    def spec(self) -> CodecSpec:
        """Return the codec as a file stores it, in the least version that suffices: version 0 knows one weight per window alone,
        versions 0 and 1 no multiplier but the format's own, versions 0 to 2 no half bits."""
        spec = super().spec()
        if self.code_bits not in RATES[1]:
            return spec
        if self.multiplier:
            return CodecSpec(self.id, 2, spec.config)
        del spec.config["multiplier"]
        if self.weights_per_window == 1:
            del spec.config["weights_per_window"]
        return CodecSpec(self.id, self.weights_per_window - 1, spec.config)

    @classmethod
    def from_config(cls, config: Any) -> Codec:
        """Return the codec of stored hyperparameters, those of older versions too."""
        old = {"weights_per_window": 1, "multiplier": 0}
        return super().from_config({**old, **config} if isinstance(config, Mapping) else config)

    def with_hessian(self) -> TrellisCodec:
        """Return this codec with streams that are not tail-biting."""
        return replace(self, circular=False)

    def expected_error(self) -> float:
        """Return what was measured with the default effort."""
        return distortion(self.code_bits)

    def quick(self) -> TrellisCodec:
        """Return this codec with the effort "fast"."""
        return replace(self, effort="fast")

    @property
    def survivors(self) -> int:
        """The binary logarithm m of the paths that the search keeps."""
        return survivors(self.effort, self.weights_per_window, self.code.symbol_bits, self.code.memory_bits)

    def parts(self, shape: Shape) -> dict[str, PartSpec]:
        """Return streams, scales and exponent, and the balance where it pays."""
        rows, columns = shape
        parts: dict[str, PartSpec] = {
            "weight": ("U8", self.code.stream_shape(rows, columns)),
            "scales": ("I16", (rows,)),
            "exponent": ("I8", (1,)),
        }
        if self.balance and rows >= BALANCE_ROWS:
            parts["balance"] = ("U8", packed_shape(1, columns, BALANCE_BITS))
        return parts

    def encode(
        self,
        weight: Float[Tensor, "out in"],
        importance: ImportanceLike = None,
        *,
        progress: Progress | None = None,
        backend: Backend = "auto",
    ) -> Parts:
        """Balance, rotate, search each row's stream, and fit its scale by least squares.

        In float64 up to the search, which is exact: so machines that sum in another order find the same stream.

        With error power D the same in every rotated channel, Σ_c h[c]·‖error of channel c‖² is least if channel c is
        multiplied by (h[c] / ‖w[:, c]‖²)^¼ first (Cauchy and Schwarz); h is `importance`, or estimated from norms. With a
        Hessian, weights compensate for errors (`feedback.py`), and h counts less: its diagonal to the ⅛, the norm to the -¾.
        """
        (rows, columns), device = weight.shape, weight.device
        importance = Importance.of(importance).require(self.id, columns)
        if importance.has_hessian and self.circular:
            raise CodecError(f"{self.id}: a Hessian is for streams with circular=false; give its diagonal otherwise")
        parts: Parts = {}
        if "balance" in self.parts((rows, columns)):
            parts["balance"] = pack(channel_scaling(weight, importance)[None], BALANCE_BITS).to(device)
        balance = self._input_scales(parts, columns, device)
        factor = None
        if importance.has_hessian:
            factor = self._factor(importance.damped().to(device), balance.double())
        initial_scale = code_unit(self.effort, self.weights_per_window, self.code_bits)
        if factor is not None:
            initial_scale *= target_spread(factor, self.expected_error())
        padded = self.code.padded(columns)
        stream = torch.empty(self.code.stream_shape(rows, columns), dtype=torch.uint8, device=device)
        scale = torch.empty(rows, dtype=torch.float64, device=device)
        step = max(ROWS_AT_ONCE[device.type], WEIGHTS_AT_ONCE[device.type] // columns)
        for row in range(0, rows, step):
            here = slice(row, min(rows, row + step))
            rotated = rotate(weight[here].detach().double() * balance, self.seed)
            unit = rotated.square().mean(1).sqrt() * initial_scale
            for _ in range(EFFORTS[self.effort].rounds):
                values = torch.nn.functional.pad(rotated / unit.clamp_min(1e-38)[:, None], (0, padded - columns))
                stream[here] = trellis_search(
                    values, self.code, survivors=self.survivors, columns=columns, factor=factor, backend=backend
                )
                decoded = trellis_decode(stream[here], self.code, columns=columns, backend=backend).double()
                target = rotated
                if factor is not None:
                    decoded, target = decoded @ factor, rotated @ factor
                unit = (target * decoded).sum(1) / decoded.square().sum(1).clamp_min(1e-30)
            scale[here] = unit / VALUE_UNIT
            if progress:
                progress((here.stop - row) * columns)
        return parts | {"weight": stream} | self._scales(scale)

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype, backend: Backend = "auto") -> Tensor:
        """Return float32(value)/128·(scale·2^exponent), exact but for one rounding, rotated back and divided by the balance."""
        weight = trellis_dense(parts["weight"], self._scale(parts), self.code, columns=shape[1], backend=backend)
        weight = unrotate(weight, self.seed)
        return (weight / self._input_scales(parts, shape[1], weight.device)).to(dtype)

    def prepare(self, parts: Parts, shape: Shape, bias: Tensor | None, planes: int) -> Product | None:
        """Prepare the product of few tokens on the CPU: activations are rotated, rounded, and multiplied as bytes."""
        scale, factor = self._prepared_scales(parts, shape[1])
        kept = [parts[name] for name in ("scales", "exponent", "balance") if name in parts]
        return trellis_prepare(
            parts["weight"], scale, factor, self.code, columns=shape[1], bias=bias, planes=planes, kept=kept
        )

    def _product(self, x: Tensor, parts: Parts, shape: Shape, backend: Backend, int8: bool = False) -> Tensor:
        """Rotate the activations instead of the weight, round them to 8 bits if asked (many of them on some CPUs with the weight),
        and multiply by the stream."""
        scale, factor = self._prepared_scales(parts, shape[1])
        if int8 and backend in ("auto", "cpu") and self.int8_by_default and bytes_are_faster(x):
            planes = 2 if self.code_bits > 3 else 1
            return trellis_byte_linear(x, factor, parts["weight"], scale, self.code, planes=planes, backend=backend)
        return trellis_linear(x, factor, parts["weight"], scale, self.code, int8=int8, backend=backend)

    def _product_transposed(self, grad: Tensor, parts: Parts, shape: Shape, backend: Backend) -> Tensor:
        """Multiply by the stream, which gives the gradient to the rotated activations, and rotate it back."""
        scale, factor = self._prepared_scales(parts, shape[1])
        options: dict[str, Any] = {"columns": shape[1], "backend": backend}
        rotated = trellis_matmul_transposed(grad.float(), parts["weight"], scale, self.code, **options)
        return (mix(rotated, None, backend) * factor).to(grad.dtype)

    def rescaled(self, parts: Parts, factors: Tensor) -> Parts:
        """Return the parts with the factors in the scales."""
        scale = self._scale(parts).double() / VALUE_UNIT * factors.double()
        return {**parts, **self._scales(scale)}

    def decoding_cost(self, shape: Shape) -> int:
        """Return three matrices in float32, between which the rotation works, and a fourth one where orders are odd."""
        return 16 * math.prod(shape)

    def rows(self, parts: Parts, index: Tensor) -> Parts:
        """Return streams and scales of some rows, and exponent and balance of all."""
        return {**parts, "weight": parts["weight"][index], "scales": parts["scales"][index]}

    def check(self, parts: Mapping[str, Tensor], shape: Shape) -> None:
        """Check the parts' form, that scales are finite, and that the exponent is in range."""
        super().check(parts, shape)
        if parts["weight"].device.type == "meta":
            return
        if not EXPONENT_MIN <= int(parts["exponent"]) <= EXPONENT_MAX:
            raise CodecError(f"{self.id}: exponent {int(parts['exponent'])} is not in {EXPONENT_MIN} … {EXPONENT_MAX}")
        if not torch.isfinite(parts["scales"].view(torch.float16)).all():
            raise CodecError(f"{self.id}: a scale is not finite; the file is corrupt")

    def _factor(self, hessian: Tensor, balance: Tensor) -> Tensor:
        """Return C of the Hessian's C·Cᵀ in the basis that is searched: balanced and rotated, lower triangular [in, in]."""
        half = rotate(hessian / balance / balance.view(-1, 1), self.seed)
        factor: Tensor = torch.linalg.cholesky(rotate(half.mT.contiguous(), self.seed))
        return factor

    @staticmethod
    def _input_scales(parts: Parts, columns: int, device: torch.device) -> Tensor:
        """Return the factor that each input channel of the weight was multiplied by: float32 [in], or [1] for all ones."""
        return (
            input_scales(parts["balance"], columns)
            if "balance" in parts
            else torch.ones(1, dtype=torch.float32, device=device)
        )

    @cached_property
    def code(self) -> TrellisCode:
        """The code that the streams are made of."""
        key, weights = trellis_key(self.seed), self.weights_per_window
        return TrellisCode(self.code_bits, self.state_bits, key, self.circular, weights, self.multiplier)

    @staticmethod
    def _scale(parts: Parts) -> Tensor:
        """Return the scales of the integers, float32 [out]."""
        return row_scales(parts["scales"], parts["exponent"])

    def _prepared_scales(self, parts: Parts, columns: int) -> tuple[Tensor, Tensor]:
        """Return the scales of the integers, and the factors of activations before they are mixed.

        They are kept on the CPU, where comparing the parts takes less time than making them. On a GPU the host would wait
        for what it compares; there one launch makes them anew.
        """
        scales, exponent, balance = parts["scales"], parts["exponent"], parts.get("balance")

        def compute() -> tuple[Tensor, Tensor]:
            return trellis_scales(scales, exponent, balance, signs(self.seed, columns, scales.device))

        if not scales.is_cpu:
            return compute()
        return derived([scales, exponent] if balance is None else [scales, exponent, balance], (self, columns), compute)

    @staticmethod
    def _scales(scale: Tensor) -> Parts:
        """Return the parts that hold scales [out]: the exponent puts the largest into [1, 2)."""
        top = float(scale.abs().max())
        exponent = min(max(math.frexp(top)[1] - 1, EXPONENT_MIN), EXPONENT_MAX) if top > 0 else 0
        scales = torch.ldexp(scale, torch.tensor(-exponent, dtype=scale.dtype)).to(torch.float16)
        return {
            "scales": scales.view(torch.int16),
            "exponent": torch.tensor([exponent], dtype=torch.int8, device=scale.device),
        }
