"""Measuring the plan of a packed language model, and tuning its scales: with both models in memory."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seedpack.codecs.interfaces import Rates, RowScaling
from seedpack.converter.calibration import layerwise, measuring, tuning
from seedpack.converter.calibration.calibrate import store_of, tokens_of
from seedpack.converter.calibration.tuning import Student, Tuned, tune
from seedpack.converter.fitting import decoded, fit, fit_all
from seedpack.converter.journal import tensors_digest
from seedpack.converter.plan import Plan, TensorPlan
from seedpack.converter.run import Run
from seedpack.converter.snapshot import Snapshot
from seedpack.converter.sources.base import OpenModel
from seedpack.converter.statistics import Statistics
from seedpack.dtypes import PACKABLE
from seedpack.errors import ModelError
from seedpack.memory import free_bytes

MEMORY = 12  # bytes for each weight, beside the model: a copy in float32, and gradients of the largest


def measured_plan(run: Run, plan: Plan, statistics: Statistics, remade: Callable[[Mapping[str, float]], Plan]) -> Plan:
    """Return the better of two plans of a budget: the given one, and one by what it is measured to lose; see `measuring`.

    The given one where that cannot be measured: of what is no language model, of mixtures, without room for both models, by a
    run that fits nothing or only a share.

    Args:
        run: the run, which fits all tensors of both plans.
        plan: by sizes.
        statistics: to fit with.
        remade: makes a plan of costs by tensor name.
    """
    calibration, has_experts = run.calibration, any(t.kind == "expert" and t.packed for t in plan.tensors)
    asked = calibration is not None and calibration.measure and calibration.is_text
    if not asked or run.journal is None or run.share is not None:
        return plan
    opened = run.source.open_model()
    is_large = layerwise.on_disk(opened.module) or free_bytes() < MEMORY * sum(
        p.numel() for p in opened.module.parameters()
    )
    if has_experts or is_large:
        why = "a mixture of experts" if has_experts else "no room for both models"
        run.progress("Measuring", 0, 0, "", f"the bits are spread by the sizes of tensors, not measured: {why}")
        return plan
    opened.module.to(run.device)
    shared, compared = measuring.halves(tokens_of(run, opened, store_of(run)))

    def told(stage: str, ids: Tensor) -> Callable[[int], None]:
        return lambda count: run.progress(stage, count, ids.numel(), "tokens")

    def fitting(plan: Plan, tensors: Iterable[TensorPlan]) -> Run:
        fits = replace(run, weights=sum(math.prod(tensor.shape) for tensor in tensors))
        fits.progress("Fitting", 0, fits.weights, "weights")
        fit_all(fits, plan, statistics)
        return fits

    def tried(plan: Plan) -> Plan:
        return plan.quick() if run.options.in_sequence else plan  # in sequence nothing that is fitted now can be kept

    trial = tried(plan)
    before = {tensor.name: tensor for tensor in trial.tensors if tensor.packed}
    packed = _student(fitting(trial, before.values()), opened, trial, statistics).model
    tensors = [tensor for tensor in before.values() if isinstance(tensor.codec, Rates)]
    names = {name: tensor.name for tensor in tensors for name in run.source.parameters(tensor.name)}
    pair = measuring.Pair(opened.module, packed, opened.layer_names, names)
    found = measuring.shares(pair, shared, told("Measuring shares", shared))
    if not found:
        return plan  # the text reaches nothing that is packed
    sizes = {t.name: (t.codec.expected_error(), math.prod(t.shape)) for t in tensors if isinstance(t.codec, Rates)}
    other = remade(measuring.costs(found, sizes))
    other_trial = tried(other)
    changed = [tensor for tensor in other_trial.tensors if tensor.packed and tensor != before.get(tensor.name)]
    if not changed:
        return plan
    lost = measuring.divergence(pair, compared, told("Measuring the plan", compared))
    _fill(fitting(other_trial, changed), packed, changed, statistics)
    loses = measuring.divergence(pair, compared, told("Measuring the new plan", compared))
    text = f"KL divergence {lost:.4g} by sizes, {loses:.4g} by measured costs"
    run.progress("Measuring", 0, 0, "", f"{text}: {'these' if loses < lost else 'those'} are followed")
    return other if loses < lost else plan


def tune_packed(run: Run, plan: Plan, statistics: Statistics) -> Tuned:
    """Tune scales, norms' gains and biases of the packed model to the original; see `tuning.tune`.

    All tensors are fitted first, and taken from the journal then. Both models are in memory.
    """
    calibration = run.calibration
    assert calibration is not None and run.journal is not None
    if not calibration.is_text:
        raise ModelError("tuning is for language models calibrated on text")
    if any(tensor.kind == "expert" and tensor.packed for tensor in plan.tensors):
        raise ModelError(f"{run.source.name}: tuning does not know mixtures of experts yet; leave it out")
    fitted = [tensors_digest(fit(run, tensor, statistics)[0]) for tensor in plan.tensors]
    opened = run.source.open_model()
    if layerwise.on_disk(opened.module):
        raise ModelError(f"{run.source.name}: does not fit memory, and tuning needs it there twice; leave it out")
    opened.module.to(run.device)
    ids = tokens_of(run, opened, store_of(run))
    student = _student(run.quiet(), opened, plan, statistics)
    teacher = opened.module
    if teacher.dtype != torch.float32:
        teacher = copy.deepcopy(teacher).float()  # a live one stays as it is
    made_of = [fitted, run.source.fingerprint, calibration.tune, calibration.seed, tensors_digest({"ids": ids})]
    made_of += [tuning.TOKENS_AT_ONCE, tuning.RATE]  # a state of other steps is not gone on with
    key = f"{run.device.type} {hashlib.sha256(json.dumps(made_of).encode()).hexdigest()}"
    return tune(
        student,
        teacher,
        ids,
        epochs=calibration.tune,
        seed=calibration.seed,
        progress=run.progress,
        snapshot=Snapshot(run.tuning, key),
    )


def _student(run: Run, opened: OpenModel, plan: Plan, statistics: Statistics) -> Student:
    """Return a copy of the model with decoded weights, and what of it can be tuned."""
    model = copy.deepcopy(opened.module).float()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values = []
    for tensor in plan.tensors:
        if not tensor.packed and len(tensor.shape) == 1 and tensor.dtype in PACKABLE:
            values += [name for name in run.source.parameters(tensor.name)[:1] if name in parameters]
    packed = [tensor for tensor in plan.tensors if tensor.packed]
    _fill(run, model, packed, statistics)
    scaled = [tensor for tensor in packed if tensor.kind != "conv" and isinstance(tensor.codec, RowScaling)]
    rows = {name: t.name for t in scaled for name in run.source.parameters(t.name) if name in parameters}
    return Student(model, opened.layer_names, rows, values)


@torch.no_grad()
def _fill(run: Run, model: Any, tensors: Iterable[TensorPlan], statistics: Statistics) -> None:
    """Set the parameters of packed tensors to what these decode to."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for tensor in tensors:
        if names := [name for name in run.source.parameters(tensor.name) if name in parameters]:
            value = decoded(tensor, fit(run, tensor, statistics)[0], run.device)
            for name in names:
                parameters[name].copy_(value)
