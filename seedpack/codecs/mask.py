"""The mask codec: supermasks, frozen pseudorandom weights of one size of which a mask keeps some.

Edge-popup: Ramanujan et al., CVPR 2020, arXiv 1911.13299.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seedpack._shapes import Float
from seedpack.codecs.base import Codec, Parts, Progress, Shape, require_check, require_whole
from seedpack.codecs.derived import derived
from seedpack.codecs.importance import Importance, ImportanceLike
from seedpack.codecs.interfaces import HessianFitting
from seedpack.codecs.range_coder import stream
from seedpack.errors import CodecError
from seedpack.formats import PartSpec
from seedpack.kernels.dispatch import Backend
from seedpack.keys import keystream_words
from seedpack.linalg import fixed_order
from seedpack.prng import philox_words, signs

WORD_BYTES = 4
WEIGHTS_AT_ONCE = 1 << 20
LEAST = 2.0**-10  # probability that the coder has of either bit: so few bytes stand for no more than 700 weights a bit
SLACK = 1 + 2.0**-10  # what the coder's own rounding may cost


def kept_of(kept: float, weights: int) -> int:
    """Return how many of so many weights a mask keeps."""
    return round(kept * weights)


def frozen_signs(seed: int, shape: Shape, device: torch.device, key: str = "") -> Tensor:
    """Return ±1, float32 [out, in], row-major from the low bits of the seed's Philox stream (M22), or of a private key's."""
    count = math.prod(shape)
    words = -(-count // 32)
    bits = keystream_words(key, seed, words).to(device) if key else philox_words(seed, words, device=device)
    return signs(bits, count).view(shape)


@dataclass(frozen=True)
class MaskCodec(Codec, HessianFitting):
    """W = scale · sign · mask: the signs come from the seed, the mask keeps a fixed share of the weights. Parts:

    - weight: the mask in row-major order, entropy-coded with the share as each bit's probability, uint8 [bytes, 1, 1]:
      Constriction's range coder (words of 32 bits, little-endian), filled up with zeros to a size that share and shape
      give: the mask's entropy, 2^-10 of it and two words.
    - scale: float32 bit pattern, int32 [1].

    It is for training (`seedpack.reparam.mask_`). Of a trained matrix, it keeps the weights whose sign is right and that
    are largest.

    Attributes:
        kept: the share of weights that are kept, above 0 and below 1.
        seed: of the signs.
        key: the check of the private key that the signs come from (`seedpack.keys`), "" for none.
    """

    id: ClassVar[str] = "mask"
    version: ClassVar[int] = 0
    summary: ClassVar[str] = "frozen pseudorandom weights of which a mask keeps some, to be trained in"
    kept: float = 0.5
    seed: int = 0
    key: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.kept, (int, float)) or isinstance(self.kept, bool) or not 0 < self.kept < 1:
            raise CodecError(f"{self.id}: kept must be above 0 and below 1, got {self.kept!r}")
        require_whole(self.id, "seed", self.seed, 0, 2**63 - 1)
        require_check(self.id, self.key)

    def parts(self, shape: Shape) -> dict[str, PartSpec]:
        """Return the coded mask, of the size that its entropy gives, and the scale."""
        return {"weight": ("U8", (self._words(shape) * WORD_BYTES, 1, 1)), "scale": ("I32", (1,))}

    def encode(
        self,
        weight: Float[Tensor, "out in"],
        importance: ImportanceLike = None,
        *,
        progress: Progress | None = None,
        backend: Backend = "auto",
    ) -> Parts:
        """Keep the weights that agree most with their frozen sign; the scale is their mean."""
        importance = Importance.of(importance).require(self.id, weight.shape[1])
        with fixed_order():
            mask, scale = self._fitted(weight.detach().float(), importance)
        if progress:
            progress(weight.numel())
        return self.stored(mask, scale)

    def _fitted(self, value: Tensor, importance: Importance) -> tuple[Tensor, float]:
        """Return the mask, bool [out, in], and the scale."""
        root = (
            importance.channel_weights().sqrt().float()
            if importance
            else torch.ones(value.shape[1], dtype=torch.float32)
        )
        root = root.to(value.device)
        agreeing = value * frozen_signs(self.seed, tuple(value.shape), value.device, self.key)
        kept = (agreeing * root).flatten().topk(kept_of(self.kept, value.numel())).indices
        mask = torch.zeros(value.numel(), dtype=torch.bool, device=value.device)
        mask[kept] = True
        h = root.square().expand_as(value).flatten()[kept]
        return mask.view(value.shape), max(0.0, float((agreeing.flatten()[kept] * h).sum() / h.sum().clamp_min(1e-30)))

    def stored(self, mask: Tensor, scale: float) -> Parts:
        """Return the parts of a mask, bool [out, in], that keeps exactly the share that it should."""
        if int(mask.sum()) != (kept := kept_of(self.kept, mask.numel())):
            raise CodecError(f"{self.id}: a mask of {mask.numel()} weights keeps {int(mask.sum())}, expected {kept}")
        coder = stream("mask")
        encoder = coder.queue.RangeEncoder()
        encoder.encode(mask.flatten().cpu().numpy().astype(np.int32), self._model(coder, mask.numel()))
        words = encoder.get_compressed()
        padded = np.zeros(self._words(tuple(mask.shape)), "<u4")
        if len(words) > len(padded):
            raise CodecError(f"{self.id}: the coded mask takes {len(words)} words, expected at most {len(padded)}")
        padded[: len(words)] = words
        coded = torch.from_numpy(padded.view(np.uint8).copy())[:, None, None].to(mask.device)
        return {
            "weight": coded,
            "scale": torch.tensor([scale], dtype=torch.float32, device=mask.device).view(torch.int32),
        }

    def mask(self, parts: Parts, shape: Shape) -> Tensor:
        """Decode the mask, bool [out, in], on the CPU."""
        mask, first = np.zeros(math.prod(shape), np.bool_), 0
        for piece in self._pieces(parts, shape):
            mask[first : first + len(piece)] = piece
            first += len(piece)
        return torch.from_numpy(mask).view(shape)

    def _pieces(self, parts: Parts, shape: Shape) -> Iterator[NDArray[np.int32]]:
        """Decode the mask's bits in row-major order, some at a time."""
        coder, weights = stream("mask"), math.prod(shape)
        words = parts["weight"].flatten().cpu().numpy().view("<u4").astype(np.uint32)
        decoder, model = coder.queue.RangeDecoder(words), self._model(coder, weights)
        for first in range(0, weights, WEIGHTS_AT_ONCE):
            yield decoder.decode(model, min(WEIGHTS_AT_ONCE, weights - first))

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype, backend: Backend = "auto") -> Tensor:
        """Return scale · sign where the mask keeps a weight; mask and signs stay in memory, two bits per weight."""
        kept, negative = derived([parts["weight"]], (self, shape), lambda: self._packed(parts, shape))
        scale = parts["scale"].view(torch.float32)
        values = torch.stack((torch.zeros_like(scale), scale, -scale)).flatten().to(dtype)
        return values[_bits(kept, shape) * (1 + _bits(negative, shape))]

    def decoding_cost(self, shape: Shape) -> int:
        """Return the weight, and its bits as the numbers that choose it."""
        return 32 * math.prod(shape)

    def checking_cost(self, shape: Shape) -> int:
        """Return the work of decoding the mask."""
        return math.prod(shape)

    def check(self, parts: Mapping[str, Tensor], shape: Shape) -> None:
        """Check the parts' form, that the scale is finite, and that the mask keeps as many weights as it should."""
        super().check(parts, shape)
        if parts["weight"].device.type == "meta":
            return
        if not torch.isfinite(parts["scale"].view(torch.float32)).all():
            raise CodecError(f"{self.id}: the scale is NaN or Inf; the file is corrupt")
        try:
            kept = sum(int(piece.sum()) for piece in self._pieces(dict(parts), shape))
        except AssertionError as error:  # raised by the coder for data that no encoder wrote
            raise CodecError(f"{self.id}: the coded mask is corrupt ({error})") from None
        if kept != (expected := kept_of(self.kept, math.prod(shape))):
            raise CodecError(f"{self.id}: the mask keeps {kept} weights, expected {expected}; the file is corrupt")

    def _packed(self, parts: Parts, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return mask and signs (set: negative), eight to a byte."""
        device = parts["weight"].device
        negative = frozen_signs(self.seed, shape, torch.device("cpu"), self.key) < 0
        return tuple(
            torch.from_numpy(np.packbits(bits.flatten().numpy(), bitorder="little")).to(device)
            for bits in (self.mask(parts, shape), negative)
        )  # type: ignore[return-value]

    def _words(self, shape: Shape) -> int:
        """Return the count of 32-bit words that a mask of this share never exceeds."""
        weights = math.prod(shape)
        share = self._share(weights)
        kept = kept_of(self.kept, weights)
        entropy = -kept * math.log2(share) - (weights - kept) * math.log2(1 - share)
        return math.ceil(SLACK * entropy / 32) + 2

    def _share(self, weights: int) -> float:
        """Return the coder's probability that a weight is kept, off 0 and 1."""
        return min(max(kept_of(self.kept, weights) / weights, LEAST), 1 - LEAST)

    def _model(self, coder: Any, weights: int) -> Any:
        return coder.model.Bernoulli(self._share(weights), perfect=False)


def _bits(packed: Tensor, shape: Shape) -> Tensor:
    """Unpack bits, eight to a byte, as int64 of a shape."""
    places = torch.arange(8, device=packed.device)
    return (packed[:, None].long() >> places & 1).flatten()[: math.prod(shape)].view(shape)
