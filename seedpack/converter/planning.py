"""Plans of a run: by its options, and by what a calibration measures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from seedpack._version import WRITER
from seedpack.codecs.base import Codec
from seedpack.converter.budget import is_spread, with_bits, with_size
from seedpack.converter.calibration.calibrate import calibrate, calibrate_in_sequence
from seedpack.converter.calibration.packed import measured_plan
from seedpack.converter.calibration.sequence import SequenceError
from seedpack.converter.fitting import raw_by_value
from seedpack.converter.options import CompressOptions, checking_options, float_dtype
from seedpack.converter.plan import Plan, codec_for, default_plan
from seedpack.converter.run import Run
from seedpack.converter.sources.base import Source
from seedpack.converter.statistics import Statistics
from seedpack.dtypes import dtype_name
from seedpack.errors import ModelError, OptionError
from seedpack.formats.writer import file_bytes
from seedpack.units import count

Edits = str | Path | Mapping[str, Any]  # a plan document, or a file that holds one


def plan_of(run: Run, given: Plan | Edits | None) -> Plan:
    """Return the plan of a run, which packs something."""
    planned = make_plan(run.source, run.options, given)
    asked_for = run.options.exclude or given is not None or run.options.is_raw
    if not planned.packed_weights and not asked_for:
        raise ModelError(_nothing_packed(run.source.name, planned))
    return planned


def make_plan(
    source: Source,
    options: CompressOptions,
    given: Plan | Edits | None = None,
    sensitivities: Mapping[str, float] | None = None,
    hessians: Collection[str] = (),
) -> Plan:
    """Make the plan of a source.

    Args:
        source: the model.
        options: the choices.
        given: a plan of this source, which is followed, or a plan document or file whose choices win.
        sensitivities: by tensor name, as for `budget.allocate`.
        hessians: the names of tensors that a Hessian is known for.
    """
    if unknown := sorted((options.importance or {}).keys() - source.tensors.keys()):
        raise ModelError(f"importance is given for {unknown[0]!r}; no such tensor in the model")
    if isinstance(given, Plan):
        options.require_no_choices()
        given.require_source(source.tensors)
        return given
    codec = options.codec
    if isinstance(codec, Codec):
        if options.bits is not None:
            raise OptionError("bits are those of the codec that is given; leave them out, or name a codec")
    else:
        with checking_options():
            codec = codec_for(codec, options.bits, options.settings or {})
    dtype = dtype_name(float_dtype(options.dtype)) if options.dtype else None
    result = default_plan(
        source.tensors,
        source.shared,
        codec,
        include=options.include,
        exclude=options.exclude,
        dtype=dtype,
    )
    if options.target_size is not None:
        result = with_size(
            result,
            options.target_size,
            lambda p: _file_bytes(p.with_hessians(hessians)),
            options.head_bits,
            sensitivities,
        )
    elif isinstance(options.codec, str) or options.head_bits is not None:
        result = with_bits(result, options.bits, options.head_bits, sensitivities)
    if given is not None:
        result = result.edited_by_file(given) if isinstance(given, (str, Path)) else result.edited(given)
    result.check_experts()
    return result


def calibrate_plan(run: Run, plan: Plan, given: Plan | Edits | None) -> tuple[Plan, Statistics]:
    """Return the plan that is followed, and the statistics that it is fitted with.

    A budget is allocated once more by what errors are measured to cost in the packed model, where that can be done. Calibration
    in sequence follows the plan; for a budget the layers' inputs before packing are needed too.
    """
    options, calibration = run.options, run.calibration
    stay_raw = raw_by_value(run, plan, guesses=given is None)
    plan = plan.raw(stay_raw)
    statistics = None
    if calibration is not None and is_spread(plan, options) and not isinstance(given, Plan):
        statistics = calibrate(run)
        hessians = statistics.tensors_with_hessian(plan)

        def by_costs(costs: Mapping[str, float] | None) -> Plan:
            return make_plan(run.source, options, given, costs, hessians).raw(stay_raw).with_hessians(hessians)

        plan = by_costs(None)
        if given is None:
            plan = measured_plan(run, plan, statistics, by_costs)
    if options.in_sequence:
        statistics = _in_sequence(run, plan) or statistics
    statistics = statistics or calibrate(run, plan)
    plan = plan.with_hessians(statistics.tensors_with_hessian(plan))
    plan.check_experts()
    return plan, statistics


def _in_sequence(run: Run, plan: Plan) -> Statistics | None:
    """Calibrate in sequence; where nobody has asked for it and it cannot be done, say so, and return None."""
    assert run.calibration is not None
    try:
        return calibrate_in_sequence(run, plan)
    except SequenceError as error:
        if run.calibration.sequential:
            raise ModelError(
                f"{run.source.name}: cannot be packed in sequence ({error}); leave that out (--no-sequential, sequential=False)"
            ) from error
        run.progress("Calibrating", 0, 0, "", f"not in sequence: {error}")
        return None


def _nothing_packed(name: str, plan: Plan) -> str:
    """Return why none of a plan's tensors is packed, and what to do."""
    reasons = Counter(tensor.note for tensor in plan.tensors)
    listed = "; ".join(f"{number}: {note}" for note, number in reasons.most_common(3))
    return (
        f"{name}: nothing can be packed of {count(len(plan.tensors), 'tensor')} ({listed}): it would only grow. Pass a model with "
        "matrices of float32, float16 or bfloat16, or another codec or number of bits (codec=…, bits=…)"
    )


def _file_bytes(plan: Plan) -> int:
    return file_bytes([tensor.for_writer() for tensor in plan.tensors], plan.shared, WRITER)
