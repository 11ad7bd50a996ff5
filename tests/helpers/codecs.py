"""The checks every codec must pass."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from seedpack.codecs.base import Codec
from seedpack.codecs.interfaces import HessianFitting
from seedpack.codecs.registry import codec_from_json, codec_from_spec, codec_to_json, get_codec
from seedpack.errors import CodecError
from seedpack.formats.header import nbytes


def check_contract(codec: Codec, weight: Tensor) -> Tensor:
    """Round trip of one weight; returns it decoded."""
    shape = tuple(weight.shape)
    done: list[int] = []
    parts = codec.encode(weight, progress=done.append)
    assert sum(done) == weight.numel()
    codec.check(parts, shape)
    again = codec.encode(weight)
    assert all(torch.equal(parts[name], again[name]) for name in parts), "encoding can be repeated"
    decoded = codec.decode(parts, shape, torch.float32)
    assert decoded.shape == weight.shape and torch.isfinite(decoded).all()
    assert torch.equal(codec.decode(parts, shape, torch.bfloat16), decoded.bfloat16())
    index = torch.tensor([shape[0] - 1, 0, shape[0] - 1])
    rows = codec.decode_rows(parts, index, shape, torch.float32)
    torch.testing.assert_close(rows, decoded[index], rtol=1e-5, atol=1e-6)
    x = torch.randn(2, 5, shape[1])
    torch.testing.assert_close(codec.matmul(x, parts, shape), x @ decoded.mT, rtol=1e-4, atol=1e-4)
    stored = sum(nbytes(dtype, part) for dtype, part in codec.parts(shape).values())
    assert codec.bits_per_weight(shape) == 8 * stored / weight.numel()
    assert stored == sum(part.nbytes for part in parts.values())
    return decoded


def check_config(codec: Codec) -> None:
    """Equality, repr and JSON derive from the fields; anything else is refused."""
    config = json.loads(json.dumps(codec.spec().config))
    assert codec.from_config(config) == codec and codec_from_spec(codec.spec()) == codec
    assert codec_from_json(codec_to_json(codec)) == codec and isinstance(codec, get_codec(codec.id))
    assert type(codec).__name__ in repr(codec)
    with pytest.raises(CodecError, match="missing or unknown"):
        codec.from_config({**config, "more": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec.id2 = 1  # type: ignore[attr-defined]


def check_refusals(codec: Codec, weight: Tensor) -> None:
    """Parts of another form are refused with what was found and expected."""
    shape = tuple(weight.shape)
    parts = codec.encode(weight)
    with pytest.raises(CodecError, match=r"expected parts .* found"):
        codec.check({**parts, "more": parts["weight"]}, shape)
    with pytest.raises(CodecError, match=r"part 'weight' of a weight .* expected .* found"):
        codec.check({**parts, "weight": parts["weight"][:-1]}, shape)
    with pytest.raises(CodecError, match=r"part 'weight' of a weight .* expected .* found"):
        codec.check({**parts, "weight": parts["weight"].to(torch.int64)}, shape)


def check_hessian(codec: Codec, ratio: float) -> None:
    """A Hessian lowers the error of the product to at most `ratio` of the error without; wrong ones are refused."""
    assert isinstance(codec, HessianFitting)
    codec, (rows, columns) = codec.with_hessian(), (40, 96)
    assert codec.with_hessian() == codec
    x = torch.randn(400, columns // 3) @ torch.randn(columns // 3, columns) + torch.randn(400, columns) / 4
    weight, hessian = torch.randn(rows, columns), x.T @ x / len(x)
    errors = []
    for importance in (None, hessian):
        parts = codec.encode(weight, importance)
        codec.check(parts, (rows, columns))
        error = codec.decode(parts, (rows, columns), torch.float32) - weight
        errors.append(float((error @ hessian * error).sum()))
    assert errors[1] < ratio * errors[0]
    for wrong, message in (
        (hessian[:-1], "has shape"),
        (hessian * torch.nan, "must be finite"),
        (torch.zeros_like(hessian), "its diagonal positive"),
    ):
        with pytest.raises(CodecError, match=message):
            codec.encode(weight, wrong)
