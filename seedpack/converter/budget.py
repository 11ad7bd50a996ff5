"""Give tensors different bits, so that all together meet a budget at the least estimated loss."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from seedpack.codecs.base import Codec
from seedpack.codecs.interfaces import Rates
from seedpack.converter.options import CompressOptions
from seedpack.converter.plan import Plan, TensorPlan
from seedpack.errors import ModelError, OptionError

# How much more a relative error costs in a language model's output head than in as many other weights: measured as KL
# divergence with one kind of tensor packed at a time (docs/codecs/trellis.md).
HEAD_SENSITIVITY = 4.0
# The cost of a relative error grows slower than the count of weights: small layers are as much in every signal's way as
# large ones. Chosen in trials on one language model and one classifier (docs/codecs/trellis.md says what was tried).
SIZE_EXPONENT = 0.75
HEAD_EXTRA_BITS = 1  # the rate at which a bit saves as much in the head as elsewhere: log2(sensitivity) / 2

Sensitivities = Mapping[str, float]  # by tensor name, the cost of a relative error of 1
Option = tuple[float, float, int]  # stored bits, loss, and which of the codecs' variants has them
# Layers of one input, which serving engines compute as one product: one number of bits makes that one kernel.
FUSED = [
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
]


def is_budget(plan: Plan, bits: float | None) -> bool:
    """Return whether bits are a budget for all tensors, as a fraction is, or those of each tensor but the head."""
    return bits is not None and bool(bits % 1) and any(isinstance(tensor.codec, Rates) for tensor in plan.tensors)


def is_spread(plan: Plan, options: CompressOptions) -> bool:
    """Return whether the tensors of a plan share a budget, of bits or bytes."""
    return options.target_size is not None or is_budget(plan, options.bits)


def with_bits(
    plan: Plan, bits: float | None, head_bits: float | None, sensitivities: Sensitivities | None = None
) -> Plan:
    """Return the plan of the bits asked for."""
    if bits is not None and is_budget(plan, bits):
        return allocate(plan, bits, head_bits, sensitivities)
    return with_head_bits(plan, head_bits)


def with_size(
    plan: Plan,
    size: int,
    measure: Callable[[Plan], int],
    head_bits: float | None,
    sensitivities: Sensitivities | None = None,
) -> Plan:
    """Return the plan that stores the most in `size` bytes; `measure` returns the bytes that a plan takes.

    Raises:
        ModelError: even the cheapest variants take more.
    """
    cheapest = replace(plan, tensors=tuple(replace(t, codec=_cheapest(t)) for t in plan.tensors))
    if (least := measure(cheapest)) > size:
        raise ModelError(f"{size:,} bytes: the smallest plan takes {least:,} bytes; allow that many or more")
    overhead = measure(plan) - sum(tensor.stored_bytes for tensor in plan.tensors if tensor.packed)
    for _ in range(8):  # headers grow by some bytes with the variants allocated
        bits = 8 * (size - overhead) / max(1, plan.packed_weights)
        allocated = allocate(plan, bits, head_bits, sensitivities)
        if (excess := measure(allocated) - size) <= 0:
            return allocated
        overhead += excess
    raise ModelError(f"{size} bytes: no plan meets them; ask for a few more")


def with_head_bits(plan: Plan, head_bits: float | None) -> Plan:
    """Return the plan with the output head, where its codec has rates, at its own code bits.

    None are the code bits of the others and `HEAD_EXTRA_BITS`.

    Raises:
        OptionError: no variant has `head_bits`.
    """

    if head_bits is not None and not any(tensor.packed and tensor.kind == "head" for tensor in plan.tensors):
        raise ModelError("head_bits: no output head of a language model is packed here; leave it out")

    def at_head_bits(tensor: TensorPlan) -> TensorPlan:
        codec = tensor.codec
        if tensor.kind != "head" or not isinstance(codec, Rates):
            return tensor
        variants = {variant.rate: variant for variant in codec.variants()}
        wanted = min(codec.rate + HEAD_EXTRA_BITS, max(variants)) if head_bits is None else head_bits
        if wanted not in variants:
            raise OptionError(f"head_bits must be one of {', '.join(map(str, variants))}, got {head_bits}")
        return replace(tensor, codec=variants[wanted])

    return replace(plan, tensors=tuple(at_head_bits(tensor) for tensor in plan.tensors))


def allocate(
    plan: Plan, bits: float, head_bits: float | None = None, sensitivities: Sensitivities | None = None
) -> Plan:
    """Return the plan with variants of its packed tensors' codecs that take at most `bits` bits per weight together.

    Minimises Σ sensitivity·weights^¾·expected error over the tensors subject to Σ stored bits ≤ bits·weights: from the
    cheapest variants on, always the step that avoids most loss per bit (the Lagrangian's solution, Everett 1963), as
    long as one fits. Experts of one parameter get one variant, and so do layers that engines fuse (`FUSED`). The head takes part
    unless `head_bits` is given.

    Args:
        plan: with codecs that have rates.
        bits: the budget.
        head_bits: of the head, if it is to have no part in it.
        sensitivities: measured costs of a relative error of 1. They take the place of sensitivity·weights^¾, which is
            put in proportion to them for the other tensors.

    Raises:
        OptionError: a packed tensor's codec has no rates.
        ModelError: even the cheapest variants exceed the budget.
    """
    if head_bits is not None:
        plan = with_head_bits(plan, head_bits)
    packed = [tensor for tensor in plan.tensors if tensor.packed]
    units: dict[str, list[TensorPlan]] = {}
    for tensor in packed:
        units.setdefault(_unit(tensor), []).append(tensor)
    costs = _costs(packed, sensitivities or {})
    options = {unit: _options(tensors, head_bits, costs) for unit, tensors in units.items()}
    budget, spent = bits * plan.packed_weights, sum(cheapest[0] for cheapest, *_ in options.values())
    if spent > budget:
        raise ModelError(
            f"{bits:.4g} bits per weight: the cheapest plan takes {spent / max(1, plan.packed_weights):.3f}; "
            "ask for more bits"
        )
    levels = dict.fromkeys(units, 0)
    steps = [_step(unit, options[unit], 0) for unit in units if len(options[unit]) > 1]
    heapq.heapify(steps)
    while steps:
        _, unit, step_bits = heapq.heappop(steps)
        if spent + step_bits > budget:
            continue  # later steps of this tensor take no fewer; those of others may still fit
        spent += step_bits
        levels[unit] += 1
        if levels[unit] + 1 < len(options[unit]):
            heapq.heappush(steps, _step(unit, options[unit], levels[unit]))
    codecs = {
        t.name: _variants(t.codec)[options[unit][levels[unit]][2]] for unit, tensors in units.items() for t in tensors
    }
    return replace(plan, tensors=tuple(replace(t, codec=codecs.get(t.name, t.codec)) for t in plan.tensors))


def _unit(tensor: TensorPlan) -> str:
    """Return a name that tensors have in common that get one variant."""
    parent, _, leaf = tensor.name.removesuffix(".weight").rpartition(".")
    fused = next((names[0] for names in FUSED if leaf in names), leaf)
    return tensor.group or f"{parent}.{fused} {tensor.codec.id}"


def _variants(codec: Codec) -> Sequence[Codec]:
    """Return a codec at every rate it has, or alone."""
    return codec.variants() if isinstance(codec, Rates) else [codec]


def _cheapest(tensor: TensorPlan) -> Codec:
    return min(_variants(tensor.codec), key=lambda codec: replace(tensor, codec=codec).stored_bytes)


def _costs(tensors: list[TensorPlan], measured: Sensitivities) -> dict[str, float]:
    """Return the cost of a relative error of 1 in each tensor, estimated where it was not measured."""
    estimates = {
        t.name: math.prod(t.shape) ** SIZE_EXPONENT * (HEAD_SENSITIVITY if t.kind == "head" else 1.0) for t in tensors
    }
    known = [name for name in estimates if measured.get(name, 0.0) > 0]
    ratio = math.exp(sum(math.log(measured[name] / estimates[name]) for name in known) / max(1, len(known)))
    return {name: measured[name] if name in known else ratio * estimate for name, estimate in estimates.items()}


def _options(tensors: list[TensorPlan], head_bits: float | None, costs: Mapping[str, float]) -> list[Option]:
    """Return the variants of tensors that share one, by stored bits; those that no price of a bit favours are left out."""
    codec = tensors[0].codec
    if not isinstance(codec, Rates):
        raise OptionError(f"codec {codec.id!r} has no variants to meet a budget of bits with; use trellis")
    fixed = tensors[0].kind == "head" and head_bits is not None
    of_each = [(t, _variants(t.codec)) for t in tensors]
    hull: list[Option] = []
    for index, variant in enumerate(codec.variants()):
        if fixed and variant != codec:
            continue
        stored = sum(8 * replace(t, codec=variants[index]).stored_bytes for t, variants in of_each)
        option = (float(stored), sum(costs[t.name] for t in tensors) * variant.expected_error(), index)
        if hull and option[0] <= hull[-1][0]:  # as few bits, and less loss
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return [hull[0], *(after for before, after in pairwise(hull) if after[1] < before[1])]


def _slope(before: Option, after: Option) -> float:
    """Return the loss avoided per bit."""
    return (before[1] - after[1]) / (after[0] - before[0])


def _step(unit: str, options: list[Option], index: int) -> tuple[float, str, float]:
    """Return the step from an option to the next for the heap: what it saves per bit, negative, and its bits."""
    before, after = options[index], options[index + 1]
    return -_slope(before, after), unit, after[0] - before[0]
