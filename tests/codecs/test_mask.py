from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from seedpack.codecs.mask import MaskCodec, frozen_signs, kept_of
from seedpack.errors import CodecError
from tests.helpers.codecs import check_config, check_contract, check_refusals

CODECS = [MaskCodec(), MaskCodec(0.3, seed=7), MaskCodec(0.02), MaskCodec(0.6)]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shape", [(32, 48), (48, 31), (5, 3)], ids=str)
def test_contract(codec: MaskCodec, shape: tuple[int, int]) -> None:
    decoded = check_contract(codec, torch.randn(shape))
    kept = kept_of(codec.kept, decoded.numel())
    assert int((decoded != 0).sum()) == kept
    assert decoded.abs().unique().numel() <= 2
    signs = frozen_signs(codec.seed, shape, torch.device("cpu"))
    assert torch.equal(decoded.sign() * (decoded != 0), signs * (decoded != 0))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_config_and_refusals(codec: MaskCodec) -> None:
    check_config(codec)
    check_refusals(codec, torch.randn(32, 48))


@pytest.mark.parametrize("kept", [0.5, 0.3, 0.1, 0.01, 0.9])
def test_masks_take_their_entropy(kept: float) -> None:
    shape = (300, 500)
    entropy = -kept * math.log2(kept) - (1 - kept) * math.log2(1 - kept)
    assert MaskCodec(kept).bits_per_weight(shape) <= entropy * 1.001 + 200 / (300 * 500)
    codec = MaskCodec(kept)
    for pattern in ("random", "first", "striped"):  # any mask of the share fits
        mask = torch.zeros(shape, dtype=torch.bool).flatten()
        count = kept_of(kept, mask.numel())
        places = torch.randperm(mask.numel())[:count] if pattern == "random" else torch.arange(count)
        mask[places * (mask.numel() // count) if pattern == "striped" else places] = True
        parts = codec.stored(mask.view(shape), 0.5)
        assert torch.equal(codec.mask(parts, shape).flatten(), mask)


def test_it_keeps_what_agrees() -> None:
    weight = torch.randn(20, 30)
    importance = torch.rand(30) + 0.01
    for h in (None, importance, torch.diag(importance)):
        codec = MaskCodec(0.4, seed=2)
        decoded = codec.decode(codec.encode(weight, h), (20, 30), torch.float32)
        assert float((decoded * weight).sum()) > 0
        weigh = torch.ones(30) if h is None else importance
        assert float((weigh * (decoded - weight) ** 2).sum()) < float((weigh * weight**2).sum())


def test_damage_is_found() -> None:
    codec, shape = MaskCodec(0.3), (40, 50)
    parts = codec.encode(torch.randn(shape))
    damaged = {**parts, "weight": parts["weight"].clone()}
    damaged["weight"][10] ^= 64
    with pytest.raises(CodecError, match="corrupt"):
        codec.check(damaged, shape)
    with pytest.raises(CodecError, match="scale is NaN"):
        codec.check({**parts, "scale": torch.tensor([float("inf")]).view(torch.int32)}, shape)
    wrong: tuple[dict[str, Any], ...] = ({"kept": 0.0}, {"kept": 1.0}, {"seed": -1})
    for settings in wrong:
        with pytest.raises(CodecError, match="must be"):
            MaskCodec(**settings)
    with pytest.raises(CodecError, match=r"keeps 0, expected 600"):
        codec.stored(torch.zeros(shape, dtype=torch.bool), 1.0)
