"""A packed layer's weight answers as the dense one would, and refuses to be written to."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seedpack.errors import ModelError
from seedpack.loader.layers import PackedModule, pack_module_
from seedpack.loader.weight import PackedWeight
from tests.loader import test_layers
from tests.loader.test_layers import CASES, CODEC


def packed_and_dense(make: Any) -> tuple[Any, Any]:
    return test_layers.packed_and_dense(make)


@pytest.fixture
def never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("decoded")

    monkeypatch.setattr(PackedModule, "dense_weight", fail)


@pytest.mark.parametrize(("make", "inputs"), CASES.values(), ids=CASES.keys())
def test_what_needs_no_values(make: Any, inputs: Any, never_decoded: None) -> None:
    packed: Any = packed_and_dense(make)[0].to(torch.bfloat16)
    weight, dense = packed.weight, make().weight
    assert weight.shape == dense.shape == weight.size() and weight.ndim == weight.dim() == dense.ndim
    assert weight.dtype == torch.bfloat16 and weight.device == torch.device("cpu") and not weight.is_meta
    assert weight.numel() == dense.numel() and len(weight) == len(dense) and weight.is_floating_point()
    assert not weight.requires_grad and weight.grad is None and weight.element_size() == 2
    assert weight.data.dtype == weight.detach().dtype == torch.bfloat16 and weight.contiguous() is weight
    assert packed.weight is weight and isinstance(weight, Tensor)


READS: dict[str, Callable[[Any], Tensor]] = {
    "product": lambda w: torch.ones(20) @ w.T,
    "sum": lambda w: w.sum(),
    "clone": lambda w: w.clone(),
    "data": lambda w: w.data.float().abs().max(),
    "rows": lambda w: w[1:3],
    "cast": lambda w: w.to(torch.float64),
    "einsum": lambda w: torch.einsum("oi,i->o", w, torch.ones(20)),
    "list": lambda w: torch.cat([w, w]),
    "keyword": lambda w: F.bilinear(torch.ones(3, 20), torch.ones(3, 1), weight=w[:, :, None]),
    "numpy": lambda w: torch.from_numpy(w.numpy().copy()),
    "deepcopy": lambda w: copy.deepcopy(w),
    "equal": lambda w: w == w,
    "operator on the right": lambda w: torch.ones(12, 20) * w,
    "written into": lambda w: torch.zeros(12, 20).add_(w),
    "out": lambda w: torch.mul(w, 2, out=torch.empty(12, 20)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_values_are_those_of_the_dense_weight(read: Callable[[Any], Tensor]) -> None:
    packed, dense = packed_and_dense(CASES["linear"][0])
    found, expected = read(packed.weight), read(dense.weight.detach())
    assert not isinstance(found, PackedWeight) or found is packed.weight
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-5, atol=1e-6)


WRITES: dict[str, Callable[[Any], object]] = {
    "add_": lambda layer: layer.weight.add_(1),
    "+=": lambda layer: layer.weight.__iadd__(1),
    "copy_": lambda layer: layer.weight.copy_(torch.ones(12, 20)),
    "data.copy_": lambda layer: layer.weight.data.copy_(torch.ones(12, 20)),
    "detach().zero_": lambda layer: layer.weight.detach().zero_(),
    "data =": lambda layer: setattr(layer.weight, "data", torch.ones(12, 20)),
    "weight =": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(12, 20))),
    "index": lambda layer: layer.weight.__setitem__(0, 1),
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "out": lambda layer: torch.add(torch.ones(12, 20), 1, out=layer.weight),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    "parameter": lambda layer: nn.Parameter(layer.weight),
    "requires_grad_": lambda layer: layer.weight.requires_grad_(),
    "swap": lambda layer: layer.weight.set_(torch.ones(12, 20)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writing_is_refused(write: Callable[[Any], object]) -> None:
    packed, _ = packed_and_dense(CASES["linear"][0])
    before = packed.dense_weight()
    with torch.no_grad(), pytest.raises(ModelError, match="is read-only: .*dequantize"):
        write(packed)
    assert torch.equal(packed.dense_weight(), before)


def test_products_stay_fused(never_decoded: None) -> None:
    packed, dense = packed_and_dense(CASES["linear"][0])
    x = torch.randn(3, 20, requires_grad=True)
    found = F.linear(x, packed.weight, packed.bias)
    torch.testing.assert_close(found, dense(x), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(dense(x).sum(), x)[0], rtol=1e-5, atol=1e-5)
    table, rows = packed_and_dense(CASES["embedding"][0])
    index = torch.tensor([[3, 3], [29, 0]])
    assert torch.equal(F.embedding(index, table.weight, 2), rows(index))


class Scaled(nn.Linear):
    """A linear layer with a forward pass of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.weight.float().square().mean()


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: Scaled(20, 12), lambda: torch.randn(3, 20)),
        (lambda: ScaledEmbedding(30, 12), lambda: torch.tensor([1, 4])),
        (lambda: nn.ConvTranspose2d(4, 6, 3), lambda: torch.randn(2, 4, 5, 5)),
        (lambda: nn.Conv3d(4, 6, 3), lambda: torch.randn(2, 4, 5, 5, 5)),
    ],
    ids=["linear", "embedding", "conv-transpose", "conv3d"],
)
def test_layers_with_their_own_forward(make: Any, inputs: Any) -> None:
    packed, dense = packed_and_dense(make)
    x = inputs()
    torch.testing.assert_close(packed(x), dense(x), rtol=1e-5, atol=1e-5)
    assert type(packed).__name__ == f"Packed{type(dense).__name__}" and isinstance(packed, type(dense))


@pytest.mark.parametrize("train", [False, True])
def test_attention_stays_packed(train: bool) -> None:
    torch.manual_seed(0)
    attention, dense = nn.MultiheadAttention(16, 2), nn.MultiheadAttention(16, 2)
    dense.load_state_dict(attention.state_dict())
    parts = CODEC.encode(attention.out_proj.weight.detach())
    pack_module_(attention.out_proj, CODEC, parts)
    with torch.no_grad():
        dense.out_proj.weight.copy_(CODEC.decode(parts, (16, 16), torch.float32))
    x = torch.randn(5, 3, 16)
    for net in (attention, dense):
        net.train(train)
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(attention(x, x, x)[0], dense(x, x, x)[0], rtol=1e-5, atol=1e-5)


def test_copies_and_files_of_layers() -> None:
    packed, _ = packed_and_dense(CASES["linear"][0])
    first = packed.weight
    other = copy.deepcopy(packed)
    assert other.weight is not first and torch.equal(other.weight.clone(), first.clone())
    other.packed.data.copy_(torch.zeros_like(other.packed))
    assert not torch.equal(other.weight.clone(), first.clone())
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).weight.clone(), first.clone())
    assert packed.to(torch.float16).weight.dtype == torch.float16


def test_a_weight_does_not_keep_its_layer() -> None:
    packed, _ = packed_and_dense(CASES["linear"][0])
    weight, gone = packed.weight, weakref.ref(packed)
    gc.disable()
    try:
        del packed
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(ModelError, match="layer that this weight belonged to is gone"):
        weight.sum()


def test_compiles_where_the_weight_is_read() -> None:
    packed, dense = packed_and_dense(CASES["linear"][0])

    def net(layer: Any, x: Tensor) -> Tensor:
        y: Tensor = layer(x.to(layer.weight.dtype)) + layer.weight.shape[0] + layer.weight.sum()
        return y

    x = torch.randn(3, 20)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(packed, x), net(dense, x), rtol=1e-5, atol=1e-5)


def test_results_can_be_written_to() -> None:
    packed, dense = packed_and_dense(CASES["linear"][0])
    x = torch.randn(3, 20, requires_grad=True)
    torch.testing.assert_close(packed(x).relu_(), dense(x).relu_(), rtol=1e-5, atol=1e-5)


def test_autocast() -> None:
    packed, dense = packed_and_dense(CASES["linear"][0])
    x = torch.randn(3, 20, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = packed(x), dense(x)
        assert found.dtype == expected.dtype == packed.weight.new_ones(3, 20).matmul(packed.weight.T).dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


F0 = torch.func.functional_call
BIASES = torch.arange(24.0).view(2, 12)


def loss(net: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x).tanh().sum()


def twice(net: Any, x: Tensor) -> Tensor:
    y = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(y).tanh().sum(), y, create_graph=True)
    return torch.autograd.grad(g.square().sum(), y)[0]


def many_at_once(net: Any, x: Tensor) -> Tensor:
    y = x[0].clone().requires_grad_()
    return torch.autograd.grad(net(y), y, torch.eye(12), is_grads_batched=True)[0]


DERIVATIVES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "grad": lambda net, x, v: torch.func.grad(loss(net))(x),
    "vmap": lambda net, x, v: torch.vmap(net)(x),
    "vmap of grad": lambda net, x, v: torch.vmap(torch.func.grad(loss(net)))(x),
    "grad of vmap": lambda net, x, v: torch.func.grad(lambda y: torch.vmap(net)(y).tanh().sum())(x),
    "grad of grad": lambda net, x, v: torch.func.grad(lambda y: torch.func.grad(loss(net))(y).square().sum())(x),
    "vjp": lambda net, x, v: torch.func.vjp(net, x)[1](torch.ones(3, 12))[0],
    "jvp": lambda net, x, v: torch.func.jvp(net, (x,), (v,))[1],
    "jvp of grad": lambda net, x, v: torch.func.jvp(torch.func.grad(loss(net)), (x,), (v,))[1],
    "grad of jvp": lambda net, x, v: torch.func.grad(lambda y: torch.func.jvp(loss(net), (y,), (v,))[1])(x),
    "jacrev": lambda net, x, v: torch.func.jacrev(net)(x[0]),
    "jacfwd": lambda net, x, v: torch.func.jacfwd(net)(x[0]),
    "jacfwd of jacfwd": lambda net, x, v: torch.func.jacfwd(torch.func.jacfwd(loss(net)))(x[0]),
    "hessian": lambda net, x, v: torch.func.hessian(loss(net))(x[0]),
    "autograd twice": lambda net, x, v: twice(net, x),
    "autograd, many gradients": lambda net, x, v: many_at_once(net, x),
    "autograd, vectorised": lambda net, x, v: torch.autograd.functional.jacobian(net, x[0], vectorize=True),
    "of the bias": lambda net, x, v: torch.func.grad(lambda b: F0(net, {"bias": b}, (x,)).tanh().sum())(BIASES[0]),
    "per sample": lambda net, x, v: torch.vmap(
        torch.func.grad(lambda b, y: F0(net, {"bias": b}, (y,)).tanh().sum()), (None, 0))(BIASES[0], x),
    "jvp of the bias": lambda net, x, v: torch.func.jvp(lambda b: F0(net, {"bias": b}, (x,)), (BIASES[0],), (BIASES[1],))[1],
    "vmap over the bias": lambda net, x, v: torch.vmap(lambda b: F0(net, {"bias": b}, (x,)))(BIASES),
    "vmap over both": lambda net, x, v: torch.vmap(lambda b, y: F0(net, {"bias": b}, (y,)))(BIASES, x[:2]),
    "the weight": lambda net, x, v: torch.vmap(torch.func.grad(lambda y: (y @ net.weight.T).tanh().sum()))(x),
}  # fmt: skip


@pytest.mark.parametrize("work", DERIVATIVES.values(), ids=DERIVATIVES.keys())
def test_derivatives_of_every_kind(work: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    packed, dense = packed_and_dense(CASES["linear"][0])
    x, v = torch.randn(3, 20), torch.randn(3, 20)
    for net in (packed, dense):
        net.requires_grad_(False)
    torch.testing.assert_close(work(packed, x, v), work(dense, x, v), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["embedding", "conv2d"])
def test_maps_over_other_layers(name: str) -> None:
    packed, dense = packed_and_dense(CASES[name][0])
    x = CASES[name][1]()
    torch.testing.assert_close(torch.vmap(packed)(x), torch.vmap(dense)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_derivatives_compiled() -> None:
    packed, dense = packed_and_dense(CASES["linear"][0])
    x = torch.randn(3, 20)
    compiled = torch.compile(lambda y: torch.func.grad(loss(packed))(y), backend="aot_eager")
    torch.testing.assert_close(compiled(x), torch.func.grad(loss(dense))(x), rtol=1e-4, atol=1e-4)


def test_vmap_over_parts_is_refused() -> None:
    packed, _ = packed_and_dense(CASES["linear"][0])
    codes = torch.stack([packed.codes, packed.codes])
    with pytest.raises(ModelError, match=r"torch.vmap maps over the parts .* its input and its bias"):
        torch.vmap(lambda part: F0(packed, {"codes": part}, (torch.ones(20),)))(codes)


def test_writing_below_pythons_functions_is_refused() -> None:
    """Operators called by themselves, as libraries in C++ do."""
    packed, _ = packed_and_dense(CASES["linear"][0])
    with torch._C.DisableTorchFunctionSubclass():
        with pytest.raises(ModelError, match="is read-only"):
            torch.ops.aten.mul_.Tensor(packed.weight, torch.ones(()))
        assert torch.equal(torch.zeros(12, 20).add_(packed.weight), packed.dense_weight())
