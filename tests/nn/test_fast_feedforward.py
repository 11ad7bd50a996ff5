"""The layer: soft and hard passes, its loss, training, packing, and distilling a block."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import seedpack
from seedpack.codecs.base import Codec
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.mask import MaskCodec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.errors import ModelError
from seedpack.loader.layers import unpack_module_
from seedpack.nn import FastFeedforward, fastfeedforward_from, hardening_loss
from seedpack.nn.distil import _grow


def test_the_training_pass_is_the_mean_of_all_leaves() -> None:
    layer, x = FastFeedforward(6, 4, 3, 5, activation="silu"), torch.randn(2, 7, 6)
    found = layer(x)
    right = torch.sigmoid(x @ layer.nodes.weight.T + layer.node_bias)
    expected, shares = torch.zeros(2, 7, 4), []
    for leaf in range(8):
        share, node = torch.ones(2, 7), 0
        for level in (2, 1, 0):
            to_right = leaf >> level & 1
            share = share * (right[..., node] if to_right else 1 - right[..., node])
            node = 2 * node + 1 + to_right
        rows = slice(5 * leaf, 5 * leaf + 5)
        hidden = nn.functional.silu(x @ layer.leaf_in.weight[rows].T + layer.in_bias[leaf])
        expected = expected + share[..., None] * (hidden @ layer.leaf_out.weight[rows] + layer.out_bias[leaf])
        shares.append(share)
    torch.testing.assert_close(found, expected)
    entropy = -sum((share * share.log()).mean() for share in shares)
    torch.testing.assert_close(hardening_loss(layer), entropy)


def test_sure_nodes_make_both_passes_one() -> None:
    """With the leaves' biases, which the original drops in evaluation."""
    layer, x = FastFeedforward(6, 4, 3, 5), torch.randn(50, 6)
    with torch.no_grad():
        layer.nodes.weight.mul_(1e4)
        layer.node_bias.mul_(1e4)
    soft = layer(x)
    assert hardening_loss(layer).item() < 1e-2
    torch.testing.assert_close(layer.eval()(x), soft, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        layer.out_bias.add_(1)
        torch.testing.assert_close(layer(x), soft + 1, rtol=1e-3, atol=1e-3)
    assert torch.equal(layer.leaves(x), layer.mixture(x).argmax(-1))


def test_hardening_makes_choices_sure() -> None:
    x = torch.randn(400, 4)
    y = (x[:, :1] * x[:, 1:2]).sign()
    unsure = []
    for share in (0.0, 0.2):
        torch.manual_seed(1)
        layer = FastFeedforward(4, 1, 2, 8, activation="relu")
        optimiser = torch.optim.Adam(layer.parameters(), 3e-2)
        for _ in range(400):
            loss = (layer(x) - y).square().mean() + share * hardening_loss(layer)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        unsure.append(hardening_loss(layer).item())
    assert unsure[1] < 0.5 * unsure[0], unsure
    with torch.no_grad():
        assert (layer.eval()(x).sign() == y).float().mean().item() > 0.9


def test_leak_turns_choices_round() -> None:
    layer, x = FastFeedforward(4, 1, 1, 2, leak=0.25), torch.randn(4000, 4)
    with torch.no_grad():
        layer.nodes.weight.zero_()
        layer.node_bias.fill_(50)
        left = layer.mixture(x)[:, 0]
    assert abs(float(left.mean()) - 0.25) < 0.03
    assert layer.eval().mixture(x)[:, 0].max().item() < 1e-6


def test_gradients_in_evaluation_reach_the_chosen_leaf() -> None:
    layer = FastFeedforward(6, 4, 2, 3).eval()
    x = torch.randn(1, 6, requires_grad=True)
    layer(x).sum().backward()
    leaf, grad = int(layer.leaves(x.detach())), layer.leaf_out.weight.grad
    assert grad is not None and x.grad is not None and float(x.grad.abs().sum()) > 0
    assert set(grad.abs().sum(1).nonzero().flatten().tolist()) == set(range(3 * leaf, 3 * leaf + 3))


CODECS = [TrellisCodec(code_bits=4), SeedLMCodec(), SVDCodec(rank=12), BasisCodec(count=64), MaskCodec()]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.id)
def test_every_codec_packs_it(codec: Codec, tmp_path: Path) -> None:
    if codec.id == "mask":
        pytest.importorskip("constriction")
    layer, x = FastFeedforward(32, 16, 2, 16).eval(), torch.randn(40, 32)
    seedpack.compress(layer, tmp_path / "layer", codec=codec)
    loaded = seedpack.load(tmp_path / "layer", model=FastFeedforward(32, 16, 2, 16)).eval()
    assert type(loaded.leaf_in).__name__ == "PackedEmbedding"
    dense = copy.deepcopy(loaded)
    for table in (dense.nodes, dense.leaf_in, dense.leaf_out):
        unpack_module_(table)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), dense(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(loaded.train()(x), loaded.eval()(x))


def test_copies_after_a_pass() -> None:
    layer = FastFeedforward(6, 4, 2, 3)
    layer(torch.randn(2, 6)).sum().backward()
    again = copy.deepcopy(layer)
    assert torch.equal(again.leaf_in.weight, layer.leaf_in.weight)
    with pytest.raises(ModelError, match="1 fast feedforward layers, none has run in training"):
        hardening_loss(again)


def mlp_and_inputs() -> tuple[nn.Sequential, torch.Tensor]:
    """A block on inputs that lie near few directions, as real ones do."""
    mlp = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 20))
    with torch.no_grad():
        next(mlp.parameters()).mul_(3)
    return mlp, torch.randn(6000, 5) @ torch.randn(5, 24)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).square().sum() / (exact - exact.mean(0)).square().sum())


def test_a_block_is_distilled() -> None:
    mlp, x = mlp_and_inputs()
    seen: list[tuple[int, float]] = []
    errors = []
    with torch.no_grad():
        exact = mlp(x[5000:])
    for depth in (0, 4):
        layer = fastfeedforward_from(
            mlp, (x[:2000], x[2000:5000]), depth, 12, steps=300, progress=lambda *found: seen.append(found)
        )
        counts = layer.leaves(x[:5000]).bincount(minlength=2**depth)
        assert int(counts.max()) - int(counts.min()) <= 4  # a boundary halves its tokens, but for rounding
        with torch.no_grad():
            errors.append(relative(layer(x[5000:]), exact))
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.12, errors
    assert [step for step, _ in seen] == [*range(1, 301)] * 2 and seen[-1][1] < seen[300][1]
    whole = fastfeedforward_from(mlp, x, 0, 96, steps=0)
    with torch.no_grad():
        assert relative(whole(x[5000:]), exact) < 1e-10


def test_tokens_near_a_boundary_train_both_of_its_sides() -> None:
    """And tokens that are all alike do not fill every leaf."""
    for x in (torch.randn(1000, 24), torch.ones(1000, 24), torch.randn(8, 24)):
        layer = FastFeedforward(24, 20, 3, 4)
        regions = _grow(layer, x, x[:, :20].square())
        assert min(map(len, regions)) >= 1 and sum(map(len, regions)) <= 1.2**3 * len(x) + 16
        assert torch.equal(torch.cat(regions).unique(), torch.arange(len(x)))
        if len(x[:, 0].unique()) == 1000:
            leaves = layer.leaves(x)
            assert all(torch.isin((leaves == leaf).nonzero()[:, 0], mine).all() for leaf, mine in enumerate(regions))
            assert all((leaves[mine] != leaf).any() for leaf, mine in enumerate(regions))


def test_distilling_is_repeatable_and_leaves_all_else_alone() -> None:
    mlp, x = mlp_and_inputs()
    state, random = copy.deepcopy(mlp.state_dict()), torch.get_rng_state()
    first, second = (fastfeedforward_from(nn.Sequential(mlp, nn.Tanh()), x, 2, 4, steps=20) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), random) and mlp.training
    assert all(torch.equal(value, state[name]) for name, value in mlp.state_dict().items())
    other = fastfeedforward_from(nn.Sequential(nn.Linear(24, 9), nn.Tanh()).bfloat16(), x.bfloat16(), 2, 4, steps=5)
    assert other.leaf_in.weight.dtype == torch.bfloat16 and not other.training


def test_part_of_a_layer_packed(tmp_path: Path) -> None:
    layer, x = FastFeedforward(32, 16, 2, 4).eval(), torch.randn(9, 32)
    for name in ("nodes", "leaf_in", "leaf_out"):
        seedpack.compress(layer, tmp_path / name, codec=TrellisCodec(code_bits=8), include=[f"{name}.weight"])
        loaded = seedpack.load(tmp_path / name, model=FastFeedforward(32, 16, 2, 4))
        with torch.no_grad():
            assert torch.equal(loaded.train()(x), loaded.eval()(x))
            if name == "nodes":
                assert loaded.leaves(x).shape == (9,)
                with pytest.raises(ModelError, match="packed fast feedforward layer does not train"):
                    loaded.mixture(x)


def test_mistakes() -> None:
    mlp, x = mlp_and_inputs()
    for width in (3, 5):
        with torch.no_grad(), pytest.raises(ModelError, match=rf"an input \[2, {width}\], expected \[..., 4\]"):
            FastFeedforward(4, 4, 1, 1).eval()(torch.randn(2, width))
        with pytest.raises(ModelError, match=rf"an input \[2, {width}\], expected \[..., 4\]"):
            FastFeedforward(4, 4, 1, 1)(torch.randn(2, width))
    with pytest.raises(ModelError, match=r"got 4, 4, 1, 1.5 and 0.0"):
        FastFeedforward(4, 4, 1.5, 1)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="0 tokens for 2 leaves"):
        fastfeedforward_from(mlp, [], 1, 4)
    with pytest.raises(ModelError, match="unknown activation 'tanh'; known: relu, gelu, silu"):
        FastFeedforward(4, 4, 1, 1, activation="tanh")
    with pytest.raises(ModelError, match="a depth of 0 to 24"):
        FastFeedforward(4, 4, -1, 1)
    with pytest.raises(ModelError, match="3 tokens for 8 leaves"):
        fastfeedforward_from(mlp, x[:3], 3, 4)
    with pytest.raises(ModelError, match=r"the block does not take inputs \[8, 23\] of torch.float32: mat1"):
        fastfeedforward_from(mlp, x[:8, :23], 1, 4)
    with pytest.raises(ModelError, match="different widths: 23, 24; expected one"):
        fastfeedforward_from(mlp, (x[:8], x[:8, :23]), 1, 4)
    with pytest.raises(ModelError, match=r"expected \[8, out\]"):
        fastfeedforward_from(nn.Flatten(0), x[:8], 1, 4)
    x[3, 3] = float("inf")
    with pytest.raises(ModelError, match="NaN or Inf"):
        fastfeedforward_from(mlp, x, 1, 4)
