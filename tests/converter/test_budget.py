from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from seedpack.codecs.interfaces import Rates
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.budget import HEAD_SENSITIVITY, SIZE_EXPONENT, allocate, with_bits, with_head_bits
from seedpack.converter.plan import Plan, default_plan
from seedpack.converter.sources.base import SourceTensor
from seedpack.errors import CodecError, ModelError
from tests.helpers.plans import bits_of

TENSORS = {
    "head.weight": SourceTensor("F32", (512, 64), "head"),
    "a.weight": SourceTensor("F32", (128, 64), "linear"),
    "b.weight": SourceTensor("F32", (256, 96), "linear"),
    "bias": SourceTensor("F32", (64,)),
}


def plan_of(code_bits: int = 4) -> Plan:
    return default_plan(TENSORS, {}, TrellisCodec(code_bits))


def loss(plan: Plan) -> float:
    total: float = sum(
        math.prod(t.shape) ** SIZE_EXPONENT * t.codec.expected_error() * (HEAD_SENSITIVITY if t.kind == "head" else 1)
        for t in plan.tensors
        if isinstance(t.codec, Rates)
    )
    return total


@pytest.mark.parametrize("budget", [1.5, 2.3, 3.5, 4.0, 6.75, 8.9])
def test_allocation_is_near_the_best_of_all(budget: float) -> None:
    plan = allocate(plan_of(), budget)
    assert plan.totals()["bits_per_packed_weight"] <= budget
    packed = [t for t in plan.tensors if t.packed]
    best = math.inf
    for choice in itertools.product(TrellisCodec(4).variants(), repeat=len(packed)):
        codecs = dict(zip((t.name for t in packed), choice, strict=True))
        other = replace(plan, tensors=tuple(replace(t, codec=codecs[t.name]) if t.packed else t for t in plan.tensors))
        if other.totals()["bits_per_packed_weight"] <= budget:
            best = min(best, loss(other))
    assert loss(plan) <= 1.6 * best  # three tensors: a step cannot be halved


def test_more_bits_less_loss() -> None:
    losses = [loss(allocate(plan_of(), budget)) for budget in (2.25, 2.75, 3.25, 3.75, 4.25)]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 5


def test_head_gets_more() -> None:
    assert bits_of(with_bits(plan_of(3), 3.0, None)) == {"head.weight": 4, "a.weight": 3, "b.weight": 3}
    assert bits_of(with_bits(plan_of(8), 8.0, None))["head.weight"] == 8
    assert bits_of(with_head_bits(plan_of(3), 6))["head.weight"] == 6
    fixed = bits_of(allocate(plan_of(), 4.0, head_bits=2))
    assert fixed["head.weight"] == 2 and max(fixed["a.weight"], fixed["b.weight"]) > 4
    free = bits_of(allocate(plan_of(), 3.8))
    assert free["head.weight"] > free["b.weight"]


def test_experts_of_one_parameter_are_one_choice() -> None:
    tensors = {f"e{i}.weight": SourceTensor("F32", (128, 64), "expert", group=f"g{i % 2}") for i in range(6)}
    found = bits_of(allocate(default_plan(tensors, {}, TrellisCodec(4)), 3.8))
    assert len({found[f"e{i}.weight"] for i in (0, 2, 4)}) == len({found[f"e{i}.weight"] for i in (1, 3, 5)}) == 1


def test_layers_that_engines_fuse_are_one_choice() -> None:
    """Some have the part `balance`, which comes with 128 rows, and some have not: bits are shared, not codecs."""
    shapes = {"q_proj": (128, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 128)}
    tensors = {
        f"{layer}.attn.{leaf}.weight": SourceTensor("F32", shape, "linear")
        for layer in "01"
        for leaf, shape in shapes.items()
    }
    sensitivities = {
        name: 4.0 ** (5 * name.startswith("1") + 3 * ("v_proj" in name) - ("q_proj" in name)) for name in tensors
    }
    plan = allocate(default_plan(tensors, {}, TrellisCodec(4)), 4.3, sensitivities=sensitivities)
    found = bits_of(plan)
    assert plan.totals()["bits_per_packed_weight"] <= 4.3 and len(set(found.values())) > 2
    for layer in "01":
        assert len({found[f"{layer}.attn.{leaf}.weight"] for leaf in ("q_proj", "k_proj", "v_proj")}) == 1


def test_refusals() -> None:
    with pytest.raises(ModelError, match=r"1.05 bits per weight: the cheapest plan takes 1\.\d+; ask for more bits"):
        allocate(plan_of(), 1.05)
    with pytest.raises(CodecError, match="no variants to meet a budget of bits with; use trellis"):
        allocate(default_plan(TENSORS, {}, SeedLMCodec()), 3.5)
    with pytest.raises(CodecError, match="head_bits must be one of 1, 1.5, .*, 8, got 9"):
        with_head_bits(plan_of(), 9)
    untouched = default_plan(TENSORS, {}, SeedLMCodec())
    assert with_bits(untouched, 4.0, None) == untouched
