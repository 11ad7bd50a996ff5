"""Parameters that are no layer's weight stay packed, and answer as dense ones do."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 (of what was made here)
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import seedpack
from seedpack.codecs.base import Codec
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.stack import StackCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.sources.open import open_source
from seedpack.errors import ModelError
from seedpack.loader.fill import use_int8_activations_
from seedpack.loader.layers import PackedModule
from seedpack.loader.parameters import PackedParameters, can_pack, pack_, unpack_
from seedpack.loader.weight import PackedWeight

CODEC = SeedLMCodec(9, 8, 3)


class Experts(nn.Module):
    """Two stacks of matrices, one of them [in, out] as gpt-oss has them, and a table."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 40, 64))
        self.table = nn.Parameter(torch.randn(40, 4, 16))
        self.bias = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([x @ self.up[i] for i in range(3)]).sum(0) + self.bias[0]
        return y + torch.einsum("bh,hnd->bnd", x, self.table).flatten(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 64, num_layers=2, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(40, 4, kdim=40, vdim=40)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]  # type: ignore[no-any-return]


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(40, 40, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x)  # type: ignore[no-any-return]


class Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("embed", torch.randn(64, 40))
        self.register_buffer("table", torch.randn(64, 40))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.embed.t()  # type: ignore[operator]


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(40, 64)), nn.Tanh())


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(40, 64)), nn.Tanh())


NETS: dict[str, Callable[[], nn.Module]] = {
    "experts": Experts, "lstm": Recurrent, "attention": Attention, "bilinear": Bilinear, "weight-norm": weight_norm,
    "old-weight-norm": old_weight_norm, "codebook": Codebook,
}  # fmt: skip


def packed_and_dense(name: str, path: Path, codec: Codec = CODEC) -> tuple[nn.Module, nn.Module]:
    net = NETS[name]().eval()
    seedpack.compress(net, path / "packed", codec=codec)
    dense = NETS[name]().eval()
    dense.load_state_dict(seedpack.load(path / "packed", dense=True))
    return seedpack.load(path / "packed", model=NETS[name]().eval()), dense


def packed_parts(net: nn.Module) -> PackedParameters:
    return next(module for module in net.modules() if isinstance(module, PackedParameters))


@pytest.mark.parametrize("name", NETS)
def test_they_run_and_are_saved(name: str, tmp_path: Path) -> None:
    packed, dense = packed_and_dense(name, tmp_path)
    x = torch.randn(5, 40, requires_grad=True)
    torch.testing.assert_close(packed(x), dense(x), rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(net(x).square().sum(), x)[0] for net in (packed, dense)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-2)
    assert not [p.shape for p in packed.parameters() if p.is_floating_point() and p.numel() > 4096], (
        "nothing large is dense"
    )
    seedpack.save(packed, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "packed").read_bytes()


@pytest.mark.parametrize("name", ["experts", "lstm"])
def test_copies(name: str, tmp_path: Path) -> None:
    packed, _ = packed_and_dense(name, tmp_path)
    x = torch.randn(5, 40)
    expected = packed(x)
    assert torch.equal(copy.deepcopy(packed)(x), expected)
    module = packed_parts(packed)
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is type(module) and again.state_dict().keys() == module.state_dict().keys()
    cast = copy.deepcopy(packed).to(torch.bfloat16)
    assert cast(x.bfloat16()).dtype == torch.bfloat16 and packed_parts(cast).compute_dtype == torch.bfloat16
    torch.testing.assert_close(copy.deepcopy(packed).bfloat16().float()(x), expected, rtol=0.1, atol=0.5)


def test_a_codebook_is_a_buffer_again(tmp_path: Path) -> None:
    packed, dense = packed_and_dense("codebook", tmp_path)
    assert "embed_packed" in dict(packed.named_parameters()) and list(dict(packed.named_buffers())) == ["table"]
    unpack_(packed)
    assert type(packed) is Codebook and not list(packed.parameters())
    assert torch.equal(packed.get_buffer("embed"), dense.get_buffer("embed"))


def test_their_answers(tmp_path: Path) -> None:
    packed, dense = packed_and_dense("experts", tmp_path)
    assert isinstance(packed, Experts) and isinstance(dense, Experts) and isinstance(packed, PackedParameters)
    up, x = packed.up, torch.randn(5, 40)
    assert isinstance(up, PackedWeight) and up is packed.up and up.shape == (3, 40, 64) and up.dtype == torch.float32
    assert up.numel() == 7680 and not up.requires_grad
    for index in (0, -1, torch.tensor(2)):
        one = up[index]
        assert isinstance(one, PackedWeight) and one.shape == (40, 64)
        torch.testing.assert_close(one + 0, dense.up[index])
        torch.testing.assert_close(x @ one, x @ dense.up[index])
        torch.testing.assert_close(torch.matmul(x, one), x @ dense.up[index])
        torch.testing.assert_close(functional.linear(x, one.mT), x @ dense.up[index])
    for several in (torch.tensor([2, 0, 2]), slice(1, 3), torch.tensor([True, False, True]), [1, 2], (1, 3), ...):
        torch.testing.assert_close(up[several] + 0, dense.up[several])
    bias = torch.randn(40)
    torch.testing.assert_close(
        functional.linear(x, packed.table.flatten(1)[:, :40], bias),
        functional.linear(x, dense.table.flatten(1)[:, :40], bias),
    )
    torch.testing.assert_close(torch.bmm(x.expand(3, -1, -1), up), torch.bmm(x.expand(3, -1, -1), dense.up))
    assert [tuple(matrix.shape) for matrix in up] == [(40, 64)] * 3
    with pytest.raises(IndexError, match="index 3 is out of range for a stack of 3 matrices"):
        up[3]


def test_they_are_read_only(tmp_path: Path) -> None:
    packed, _ = packed_and_dense("experts", tmp_path)
    assert isinstance(packed, Experts)
    for write in (
        lambda: packed.up.mul_(2),
        lambda: packed.up[0].zero_(),
        lambda: packed.up.__setitem__(0, torch.zeros(40, 64)),
        lambda: setattr(packed, "up", nn.Parameter(torch.zeros(3, 40, 64))),
        lambda: setattr(packed.up, "data", torch.zeros(3, 40, 64)),
        lambda: nn.init.normal_(packed.table),
    ):
        with pytest.raises(ModelError, match="is read-only: what is written into it would be lost"):
            write()


def test_only_what_is_indexed_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = packed_and_dense("experts", tmp_path)
    assert isinstance(packed, Experts) and isinstance(dense, Experts)
    decoded: list[tuple[int, ...]] = []
    decode = SeedLMCodec.decode

    def counted(self: SeedLMCodec, parts: dict[str, Tensor], shape: tuple[int, ...], *rest: object) -> Tensor:
        decoded.append(shape)
        return decode(self, parts, shape, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(SeedLMCodec, "decode", counted)
    chosen = packed.up[torch.tensor([1, 1, 1])]
    assert decoded == [(64, 40)]
    torch.testing.assert_close(chosen, dense.up[[1, 1, 1]])


@pytest.mark.rounds
def test_one_matrix_multiplies_few_tokens_as_a_layer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to 8 bits unless told otherwise, prepared once, and anew once the parts lie elsewhere."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 64, 256))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.up[1])

    prepared: list[int] = []
    prepare = TrellisCodec.prepare

    def counted(self: TrellisCodec, *args: Any) -> Any:
        prepared.append(1)
        return prepare(self, *args)

    monkeypatch.setattr(TrellisCodec, "prepare", counted)
    stack, x = Stack(), torch.randn(2, 256)
    codec = StackCodec.over(TrellisCodec(4, effort="fast"), 64, 256)
    packed = pack_(stack, "up", codec, codec.encode(stack.up.detach().flatten(1)))
    assert isinstance(packed, PackedParameters)
    exact = x @ packed.packed_tensor("up").dense_weight()[1].T
    with torch.no_grad():
        few = [stack(x) for _ in range(3)]
        assert len(prepared) == 1 and torch.equal(few[0], few[2])
        assert 1e-3 < float((few[0] - exact).norm() / exact.norm()) < 1.5e-2
        for part in stack.parameters():
            part.data = part.flip(0)
        assert float((stack(x) - few[0]).norm() / few[0].norm()) < 1e-6  # the one in the middle
        assert len(prepared) == 2
        use_int8_activations_(stack, False)
        torch.testing.assert_close(stack(x), exact)


def test_they_compile_whole(tmp_path: Path) -> None:
    packed, dense = packed_and_dense("experts", tmp_path)
    x = torch.randn(5, 40)
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), dense(x), rtol=1e-4, atol=1e-4)


def test_first_levels(tmp_path: Path) -> None:
    net = Experts()
    seedpack.compress(net, tmp_path / "packed", codec=SVDCodec(rank=8, levels=4))
    packed = seedpack.load(tmp_path / "packed", model=Experts(), fraction=0.5)
    dense = seedpack.load(tmp_path / "packed", dense=True, fraction=0.5)
    torch.testing.assert_close(packed.up + 0, dense["up"])
    with pytest.raises(ModelError, match="holds the first levels of its coefficients alone"):
        seedpack.save(packed, tmp_path / "again")


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.up_packed = nn.Parameter(torch.randn(40, 64)), 3

    seedpack.compress(Taken(), tmp_path / "packed", codec=CODEC)
    net = Taken()
    with pytest.raises(
        ModelError, match="'up_packed' is an attribute of a Taken, and would be a part of 'up'; leave it raw"
    ):
        seedpack.load(tmp_path / "packed", model=net)
    assert isinstance(net.up, nn.Parameter)


def test_what_they_print(tmp_path: Path) -> None:
    packed, _ = packed_and_dense("lstm", tmp_path)
    assert "(lstm): PackedLSTM(40, 64, num_layers=2, bidirectional=True, weight_hh_l0: [256, 64], SeedLMCodec(" in repr(
        packed
    )


def test_one_copy_of_shared_ones(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Experts(), Experts()
            self.b.up = self.a.up

    seedpack.compress(Shared(), tmp_path / "packed", codec=CODEC)
    packed = seedpack.load(tmp_path / "packed", model=Shared())
    assert packed.a.up_packed is packed.b.up_packed and isinstance(packed.b.up, PackedWeight)


def test_what_is_chosen(tmp_path: Path) -> None:
    class TopKRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))
            self.state = nn.Parameter(torch.randn(64, 16))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = TopKRouter(), Experts()
            self.table = nn.Embedding(64, 64, max_norm=1.0)
            self.register_buffer("codebook", torch.randn(64, 64))

    net = Net()
    report = seedpack.compress(net, tmp_path / "packed", codec=CODEC)
    notes = {t.name: t.note for t in report.plan.tensors if not t.packed}
    assert notes == {
        "router.weight": "of a router, which few bits would change the choices of",
        "router.state": "of a router, which few bits would change the choices of",
        "experts.bias": "a bias",
        "table.weight": "not the weight of a layer that can be packed",
        "codebook": "not the weight of a layer that can be packed",
    }
    assert can_pack(net.experts, "up") and not can_pack(net, "codebook")
    assert report.plan.raw_shares()["a bias"] == 4096 / sum(t.numel() for t in net.state_dict().values())
    with pytest.raises(ModelError, match="its layer 'experts' is packed already"):
        open_source(seedpack.load(tmp_path / "packed", model=Net()))
    with pytest.raises(ModelError, match=r"nothing can be packed of 1 tensor \(1: no matrix\): it would only grow"):
        seedpack.compress({"b": torch.randn(64)}, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_any_matrix_of_a_state_dict_is_packed(tmp_path: Path) -> None:
    state = {
        "w": torch.randn(64, 96),
        "layers/0/kernel": torch.randn(96, 64),
        "moe.experts.weight": torch.randn(2, 32, 64),
        "conv.weight": torch.randn(40, 40, 33),
        "A_log": torch.randn(64, 16),
        "q_bias": torch.randn(64, 64),
    }
    report = seedpack.compress(state, tmp_path / "packed", codec=CODEC)
    found = {t.name: (t.codec.id, t.codec_shape, t.transposed) for t in report.plan.tensors if t.packed}
    assert found == {
        "w": ("seedlm", (64, 96), False),
        "layers/0/kernel": ("seedlm", (64, 96), True),
        "moe.experts.weight": ("stack", (2, 2048), False),
        "conv.weight": ("seedlm", (40, 1320), False),
    }
    dense = seedpack.load(tmp_path / "packed", dense=True)
    assert all(dense[name].shape == tensor.shape for name, tensor in state.items())
    error = (dense["moe.experts.weight"] - state["moe.experts.weight"]).norm() / state["moe.experts.weight"].norm()
    assert float(error) < 0.3 and not isinstance(report.plan.tensors[0].codec, RawCodec)


def test_a_layer_beside_it(tmp_path: Path) -> None:
    packed, _ = packed_and_dense("attention", tmp_path)
    kinds = {
        type(module).__name__ for module in packed.modules() if isinstance(module, (PackedModule, PackedParameters))
    }
    assert kinds == {"PackedMultiheadAttention", "PackedLinear"}


def test_tables_of_a_state_dict_stay_raw(tmp_path: Path) -> None:
    """A file does not tell parameters from buffers: a mask that is nearly right lets the future leak."""
    infinite = torch.full((64, 64), -torch.inf).triu(1)
    state = {
        "attn.mask": torch.ones(64, 64).tril(),
        "attn.causal": torch.ones(64, 64).tril(),
        "attn.blocked": infinite,
        "freqs_cis": torch.randn(64, 64),
        "bn.running_mean": torch.randn(64, 64),
        "w": torch.randn(64, 64),
    }
    report = seedpack.compress(state, tmp_path / "packed", codec=CODEC)
    notes = {t.name: t.note for t in report.plan.tensors}
    assert notes["attn.mask"] == notes["freqs_cis"] == notes["bn.running_mean"] == "by its name no weight"
    assert notes["attn.causal"] == notes["attn.blocked"] == "by its values no weight (a mask or a table)"
    dense = seedpack.load(tmp_path / "packed", dense=True)
    assert not notes["w"] and all(torch.equal(dense[name], state[name]) for name in state if name != "w")


def test_norms_and_routers_stay_raw(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(64, 64), Experts()
            self.router = nn.Sequential(nn.Linear(64, 64))
            self.norm = nn.LayerNorm((64, 64))

    report = seedpack.compress(Block(), tmp_path / "packed", codec=CODEC)
    assert {t.name for t in report.plan.tensors if t.packed} == {"experts.up", "experts.table"}


def test_a_stack_of_other_matrices_is_decoded_whole(tmp_path: Path) -> None:
    net = Experts()
    codec = StackCodec.over(CODEC, 40, 32)
    document = {"seedpack_plan": 1, "tensors": {"up": {"codec": "stack", "config": codec.spec().config}}}
    seedpack.compress(net, tmp_path / "packed", codec=CODEC, plan=document)
    packed, dense = seedpack.load(tmp_path / "packed", model=Experts()), seedpack.load(tmp_path / "packed", dense=True)
    assert all(torch.equal(packed.up[i] + 0, dense["up"][i]) for i in range(3))


def test_masks_without_axes(tmp_path: Path) -> None:
    packed, dense = packed_and_dense("experts", tmp_path)
    for index in (torch.tensor(True), torch.tensor(False)):
        assert torch.equal(packed.up[index], dense.up[index])  # type: ignore[index]


def test_layers_with_their_own_forward_are_pickled(tmp_path: Path) -> None:
    net = nn.ConvTranspose2d(8, 8, 3)
    seedpack.compress(net, tmp_path / "packed", codec=CODEC)
    packed = seedpack.load(tmp_path / "packed", model=nn.ConvTranspose2d(8, 8, 3))
    again, x = pickle.loads(pickle.dumps(packed)), torch.randn(1, 8, 5, 5)
    assert (
        type(again) is type(packed)
        and torch.equal(again(x), packed(x))
        and torch.equal(copy.deepcopy(packed)(x), again(x))
    )
