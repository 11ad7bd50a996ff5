from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from seedpack.codecs.base import Codec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.errors import CodecError, ModelError
from seedpack.loader.fill import use_int8_activations_
from seedpack.loader.layers import (
    PackedModule,
    codec_matrix,
    is_transposed,
    pack_module_,
    packed_class,
    unpack_module_,
)

CODEC = SeedLMCodec(9, 8, 3)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(12, 20)
    nn.init.normal_(layer.weight)
    return layer


CASES: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(20, 12), lambda: torch.randn(2, 3, 20)),
    "linear-nobias": (lambda: nn.Linear(21, 5, bias=False), lambda: torch.randn(4, 21)),
    "embedding": (lambda: nn.Embedding(30, 12, padding_idx=2), lambda: torch.tensor([[3, 3], [29, 0]])),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, groups=2, padding="same"), lambda: torch.randn(2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 8, (3, 2), stride=2, dilation=2, padding=3, padding_mode="reflect"), lambda: torch.randn(2, 3, 9, 9)),
    "transformers-conv1d": (conv1d, lambda: torch.randn(2, 3, 20)),
}  # fmt: skip


def packed_and_dense(make: Any, codec: Codec = CODEC) -> tuple[PackedModule, nn.Module]:
    """A packed module, and a dense one with the same, decoded weight."""
    module, dense = make(), make()
    dense.load_state_dict(module.state_dict())
    transposed = is_transposed(module)
    weight = module.weight.detach()
    matrix = codec_matrix(tuple(weight.shape), transposed)
    parts = codec.encode((weight.mT if transposed else weight).reshape(matrix))
    packed = pack_module_(module, codec, parts)
    decoded = codec.decode(parts, matrix, torch.float32)
    with torch.no_grad():
        dense.weight.copy_(decoded.mT if transposed else decoded.view(weight.shape))
    return packed, dense


@pytest.mark.parametrize("codec", [CODEC, SVDCodec(rank=2), SVDCodec.over(CODEC, rank=3)], ids=str)
@pytest.mark.parametrize(("make", "inputs"), CASES.values(), ids=CASES.keys())
def test_packed_equals_dense(make: Any, inputs: Any, codec: Codec) -> None:
    packed, dense = packed_and_dense(make, codec)
    x = inputs()
    torch.testing.assert_close(packed(x), dense(x), rtol=1e-5, atol=1e-5)
    assert isinstance(packed, type(dense)) or is_transposed(dense)
    assert all(not p.is_floating_point() and not p.requires_grad for n, p in packed.named_parameters() if n != "bias")
    if not x.is_floating_point():
        return
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    packed(a).square().sum().backward()
    dense(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    if getattr(dense, "bias", None) is not None:
        torch.testing.assert_close(packed.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "inputs"), CASES.values(), ids=CASES.keys())
def test_unpacking_gives_the_dense_module(make: Any, inputs: Any) -> None:
    packed, dense = packed_and_dense(make)
    module = unpack_module_(packed)
    assert type(module) is type(dense) and module.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(module.state_dict()[n], t) for n, t in dense.state_dict().items())
    assert torch.equal(module(inputs()), dense(inputs())) if not inputs().is_floating_point() else True


def test_casts_leave_parts_alone() -> None:
    packed, _ = packed_and_dense(CASES["embedding"][0])
    before = {name: part.clone() for name, part in packed.packed_parts().items()}
    assert packed(torch.tensor([1])).dtype == torch.float32
    packed.to(torch.bfloat16)
    assert packed(torch.tensor([1])).dtype == torch.bfloat16 and packed.dense_weight().dtype == torch.bfloat16
    assert all(torch.equal(part, before[name]) for name, part in packed.packed_parts().items())


def test_the_first_parameter_tells_the_dtype() -> None:
    """Foreign code casts what follows to the dtype of the first parameter; no state dict and no file has more for it."""
    for make in (CASES["embedding"][0], CASES["linear"][0], CASES["linear-nobias"][0]):
        packed, dense = packed_and_dense(make)
        net = nn.Sequential(packed, nn.LayerNorm(4))
        assert next(net.parameters()).dtype == next(packed.parameters()).dtype == torch.float32
        assert next(net.to(torch.bfloat16).parameters()).dtype == packed.weight.dtype == torch.bfloat16
        net[1].to(next(net[0].parameters()).dtype)
        bias = {"bias"} if getattr(packed, "bias", None) is not None else set()
        names = {*packed.packed_parts()} - {"weight"} | {"packed"} | bias
        assert packed.state_dict().keys() == dict(packed.named_parameters()).keys() == names
        assert all(parameter.numel() for _, parameter in packed.named_parameters())
        packed.load_state_dict(packed.state_dict())
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"packed\"[^n]*$"):
            packed.load_state_dict({name: value for name, value in packed.state_dict().items() if name != "packed"})
        assert dict(unpack_module_(packed).named_parameters()).keys() == dict(dense.named_parameters()).keys()


def test_state_dict_round_trip() -> None:
    packed, _ = packed_and_dense(CASES["linear"][0])
    other, _ = packed_and_dense(CASES["linear"][0])
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.dense_weight(), packed.dense_weight())
    assert "bits per weight" in repr(packed)


def test_what_cannot_be_packed() -> None:
    for module in (nn.LayerNorm(4), nn.Embedding(4, 4, max_norm=1.0), nn.GRU(4, 4), nn.Bilinear(2, 2, 2)):
        assert packed_class(module) is None
    with pytest.raises(ModelError, match="LayerNorm has no packed form; leave it dense"):
        pack_module_(nn.LayerNorm(4), CODEC)
    with pytest.raises(CodecError, match="expected parts"):
        pack_module_(nn.Linear(4, 4), CODEC, {})


def test_compiles_without_a_graph_break() -> None:
    packed, dense = packed_and_dense(CASES["linear"][0])
    compiled = torch.compile(nn.Sequential(packed, nn.ReLU()), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 20, requires_grad=True)
    torch.testing.assert_close(compiled(x), dense(x).relu(), rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad(dense(x).relu().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_operator_is_registered_properly() -> None:
    parts = CODEC.encode(torch.randn(6, 10))
    from seedpack.codecs.registry import codec_to_json

    arguments = (list(parts.values()), ",".join(parts), codec_to_json(CODEC), [6, 10], torch.float32)
    torch.library.opcheck(torch.ops.seedpack.decode.default, arguments)
    x = torch.randn(3, 10, requires_grad=True)
    torch.library.opcheck(
        torch.ops.seedpack.linear.default,
        (x, *arguments[:2], torch.randn(6, requires_grad=True), *arguments[2:4], False),
    )


def test_activations_of_8_bits_are_an_option() -> None:
    codec = TrellisCodec(4, effort="fast")
    layer, other = nn.Linear(256, 40), nn.Linear(256, 40)
    parts = codec.encode(layer.weight.detach())
    packed = pack_module_(layer, codec, parts)
    model = nn.Sequential(packed, nn.ReLU())
    x = torch.randn(3, 256, requires_grad=True)
    before = model(x)
    use_int8_activations_(model)
    (after := model(x)).sum().backward()
    difference = float(((after - before).norm() / before.norm()).detach())
    assert 1e-4 < difference < 2e-2 and x.grad is not None
    unpack_module_(packed)
    assert "int8_activations" not in layer.__dict__
    pack_module_(other, CODEC)
    with pytest.raises(ModelError, match=r"no packed weight's codec takes them \(found: seedlm\)"):
        use_int8_activations_(other)


@pytest.mark.rounds
@pytest.mark.parametrize("code_bits", [4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_tokens_are_rounded_where_that_costs_little(code_bits: int, dtype: torch.dtype) -> None:
    """To 8 bits for 4 bits per weight, to 16 for more; many tokens stay floats. Gradients are as before."""
    layer = nn.Linear(576, 64).to(dtype)
    codec = TrellisCodec(code_bits, effort="fast")
    packed = pack_module_(layer, codec, codec.encode(layer.weight.detach().float()))
    x = torch.randn(2, 3, 576).to(dtype)
    dense = packed.dense_weight(torch.float32)
    exact = x.float() @ dense.T + layer.bias.detach().float()
    with torch.no_grad():
        few, many = packed(x), packed(x.repeat(2, 3, 1))[:2, :3]
    least, most = (1e-3, 1.5e-2) if code_bits == 4 else (0, {torch.float32: 1e-4}.get(dtype, 5e-3))
    assert few.dtype == dtype and least < float((few.float() - exact).norm() / exact.norm()) < most
    assert float((many.float() - exact).norm() / exact.norm()) < {torch.float32: 1e-5}.get(dtype, 5e-3)
    given = x.clone().requires_grad_()
    packed(given).sum().backward()
    assert torch.equal(packed(given).detach(), few)
    assert given.grad is not None and torch.allclose(
        given.grad.float(), dense.sum(0).expand_as(x), rtol=2e-2, atol=2e-2
    )


@pytest.mark.rounds
def test_a_compiled_layer_gives_the_same_tokens() -> None:
    linears, codec = [nn.Linear(96, 64), nn.Linear(64, 8)], TrellisCodec(4, effort="fast")
    for linear in linears:
        pack_module_(linear, codec, codec.encode(linear.weight.detach()))
    layer = nn.Sequential(*linears)
    x = torch.randn(1, 96)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.rounds
def test_parts_that_move_or_change_are_seen() -> None:
    layer = nn.Linear(576, 160)
    codec = TrellisCodec(4, effort="fast")
    packed = pack_module_(layer, codec, codec.encode(layer.weight.detach()))
    other = codec.encode(torch.randn(160, 576))
    x = torch.randn(1, 576)
    with torch.no_grad():
        packed(x)
        packed.load_state_dict(
            {"packed": other["weight"], **{name: other[name] for name in other if name != "weight"}}, strict=False
        )
        exact = x @ packed.dense_weight().T + layer.bias
        assert float((packed(x) - exact).norm() / exact.norm()) < 1.5e-2
        with torch.inference_mode():
            packed.packed_parts()["scales"].copy_(codec.encode(packed.dense_weight() * 3)["scales"])
        exact = x @ packed.dense_weight().T + layer.bias
        assert float((packed(x) - exact).norm() / exact.norm()) < 1.5e-2
