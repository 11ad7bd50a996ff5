"""Give tensors different bits, so that all together meet a budget at the least estimated loss."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

from seedpack.codecs.base import Codec
from seedpack.converter.plan import Plan, TensorPlan
from seedpack.errors import CodecError, ModelError

# How much more a relative error costs in a language model's output head than in as many other weights: measured as KL
# divergence with one kind of tensor packed at a time (docs/codecs/trellis.md).
HEAD_SENSITIVITY = 4.0
# What a relative error costs grows slower than the count of weights: small layers are as much in every signal's way as
# large ones. Chosen in trials on one language model and one classifier (docs/codecs/trellis.md says what was tried).
SIZE_EXPONENT = 0.75
Costs = Mapping[str, float]
HEAD_EXTRA_BITS = 1  # the rate at which the head's error costs as much for a bit as the others': log2(sensitivity) / 2


def is_budget(plan: Plan, bits: float | None) -> bool:
    """Whether bits are a budget for all tensors, as a fraction is, or those of each tensor but the head."""
    return bits is not None and bool(bits % 1) and any(tensor.codec.variants() for tensor in plan.tensors)


def with_bits(plan: Plan, bits: float | None, head_bits: int | None, costs: Costs | None = None) -> Plan:
    """The plan of the bits asked for."""
    if bits is not None and is_budget(plan, bits):
        return allocate(plan, bits, head_bits, costs)
    return with_head_bits(plan, head_bits)


def with_size(
    plan: Plan, size: int, measure: Callable[[Plan], int], head_bits: int | None, costs: Costs | None = None
) -> Plan:
    """The plan that stores the most in `size` bytes; `measure` says what a plan takes.

    Raises:
        ModelError: even the cheapest variants take more.
    """
    cheapest = replace(plan, tensors=tuple(replace(t, codec=_cheapest(t)) for t in plan.tensors))
    if (least := measure(cheapest)) > size:
        raise ModelError(f"{size} bytes: the cheapest plan takes {least}; allow more")
    rest = measure(plan) - sum(tensor.stored_bytes for tensor in plan.tensors if tensor.packed)
    for _ in range(8):  # headers grow by some bytes with the variants chosen
        bits = 8 * (size - rest) / max(1, plan.packed_weights)
        found = allocate(plan, bits, head_bits, costs)
        if (over := measure(found) - size) <= 0:
            return found
        rest += over
    raise ModelError(f"{size} bytes: no plan found that meets them; ask for some more")


def with_head_bits(plan: Plan, head_bits: int | None) -> Plan:
    """The plan with the output head at its own code bits; None is the others' and `HEAD_EXTRA_BITS`, where there are variants.

    Raises:
        CodecError: `head_bits` is no variant's.
    """

    def choose(tensor: TensorPlan) -> TensorPlan:
        variants = tensor.codec.variants() if tensor.packed and tensor.kind == "head" else []
        if not variants:
            return tensor
        index = variants.index(tensor.codec) + HEAD_EXTRA_BITS if head_bits is None else head_bits - 1
        if not 0 <= index < len(variants) and head_bits is not None:
            raise CodecError(f"head_bits must be from 1 to {len(variants)}, got {head_bits}")
        return replace(tensor, codec=variants[min(index, len(variants) - 1)])

    return replace(plan, tensors=tuple(choose(tensor) for tensor in plan.tensors))


def _cheapest(tensor: TensorPlan) -> Codec:
    variants = tensor.codec.variants() if tensor.packed else []
    return min(variants, key=lambda codec: replace(tensor, codec=codec).stored_bytes, default=tensor.codec)


def allocate(plan: Plan, bits: float, head_bits: int | None = None, costs: Costs | None = None) -> Plan:
    """The plan with its packed tensors' codecs replaced by variants that take at most `bits` bits a weight together.

    Minimises Σ sensitivity·weights^¾·expected error over the tensors subject to Σ stored bits ≤ bits·weights: from the
    cheapest variants on, always the step of most loss avoided for a bit (the Lagrangian's solution, Everett 1963), as
    long as one fits. Experts of one parameter are one choice. The head takes part unless `head_bits` is given.

    Args:
        plan: with codecs that have variants.
        bits: the budget.
        head_bits: of the head, if it is to have no part in it.
        costs: by tensor name, what a relative error of 1 costs; where it is known it takes the place of
            sensitivity·weights^¾, which is then put in proportion for the tensors that it is not known of.

    Raises:
        ModelError: even the cheapest variants exceed the budget.
    """
    if head_bits is not None:
        plan = with_head_bits(plan, head_bits)
    packed = [tensor for tensor in plan.tensors if tensor.packed]
    units: dict[str, list[TensorPlan]] = {}
    for tensor in packed:
        units.setdefault(tensor.group or tensor.name, []).append(tensor)
    if stiff := [tensor for tensor in packed if not tensor.codec.variants()]:
        raise CodecError(f"codec {stiff[0].codec.id!r} has no variants to meet a budget of bits with; use trellis")
    budget = bits * plan.packed_weights
    weighed = _weighed(packed, costs or {})
    options = {unit: _options(tensors, head_bits, weighed) for unit, tensors in units.items()}
    spent = sum(steps[0][0] for steps in options.values())
    if spent > budget:
        raise ModelError(
            f"{bits:.4g} bits a weight: the cheapest plan takes {spent / max(1, plan.packed_weights):.3f}; ask for more bits"
        )
    chosen = dict.fromkeys(units, 0)
    steps = [_step(unit, options[unit], 0) for unit in units if len(options[unit]) > 1]
    heapq.heapify(steps)
    while steps:
        _, unit, cost = heapq.heappop(steps)
        if spent + cost > budget:
            continue  # later steps of this tensor cost no less; others may still fit
        spent += cost
        chosen[unit] += 1
        if chosen[unit] + 1 < len(options[unit]):
            heapq.heappush(steps, _step(unit, options[unit], chosen[unit]))
    codecs = {t.name: options[unit][chosen[unit]][2] for unit, tensors in units.items() for t in tensors}
    return replace(
        plan, tensors=tuple(replace(t, codec=codecs[t.name]) if t.name in codecs else t for t in plan.tensors)
    )


Option = tuple[float, float, Codec]


def _weighed(tensors: list[TensorPlan], costs: Costs) -> dict[str, float]:
    """What a relative error of 1 costs in each tensor, as far as is known or guessed."""
    guess = {
        t.name: math.prod(t.shape) ** SIZE_EXPONENT * (HEAD_SENSITIVITY if t.kind == "head" else 1.0) for t in tensors
    }
    known = [name for name in guess if costs.get(name, 0.0) > 0]
    ratio = math.exp(sum(math.log(costs[name] / guess[name]) for name in known) / max(1, len(known)))
    return {name: costs[name] if name in known else ratio * value for name, value in guess.items()}


def _options(tensors: list[TensorPlan], head_bits: int | None, weighed: Costs) -> list[Option]:
    """(stored bits, loss, codec) of each variant, by bits; those that no price of a bit would choose are left out."""
    codec = tensors[0].codec
    head = tensors[0].kind == "head"
    variants = [codec] if head and head_bits is not None else codec.variants()
    weights = sum(weighed[t.name] for t in tensors)
    hull: list[Option] = []
    for variant in variants:
        stored = sum(8 * replace(t, codec=variant).stored_bytes for t in tensors)
        option = (float(stored), weights * variant.expected_error(), variant)
        if hull and option[0] <= hull[-1][0]:  # as few bits, and less loss
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return [hull[0], *(after for before, after in pairwise(hull) if after[1] < before[1])]


def _slope(before: Option, after: Option) -> float:
    """Loss avoided for a bit."""
    return (before[1] - after[1]) / (after[0] - before[0])


def _step(unit: str, options: list[Option], index: int) -> tuple[float, str, float]:
    before, after = options[index], options[index + 1]
    return -_slope(before, after), unit, after[0] - before[0]
