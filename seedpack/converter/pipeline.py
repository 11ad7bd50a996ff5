"""The way through the converter: open, plan, calibrate, fit, write."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from seedpack._version import WRITER
from seedpack.codecs.base import Codec
from seedpack.converter.budget import is_budget, with_bits, with_size
from seedpack.converter.calibration.calibrate import (
    calibrate,
    calibrate_in_sequence,
    measured_sensitivities,
    tune_packed,
)
from seedpack.converter.calibration.store import FOLDER
from seedpack.converter.estimate import require_room
from seedpack.converter.fitting import apply_tuning, fit, raw_by_value
from seedpack.converter.journal import Journal
from seedpack.converter.options import CompressOptions, Progress, checking_options, fitting_device, float_dtype
from seedpack.converter.plan import Plan, codec_for, default_plan
from seedpack.converter.progress import shown
from seedpack.converter.report import Report
from seedpack.converter.run import Run
from seedpack.converter.sources.base import Source
from seedpack.converter.sources.open import Model, open_source
from seedpack.converter.statistics import Statistics
from seedpack.converter.trust import trusting_remote_code
from seedpack.converter.workers import fit_by_workers, require_reopened
from seedpack.dtypes import dtype_name, to_bytes
from seedpack.errors import ModelError
from seedpack.formats import CheckpointWriter, staged
from seedpack.formats.staging import kept_of, stage_of
from seedpack.formats.writer import file_bytes
from seedpack.units import count

Edits = str | Path | Mapping[str, Any]  # a plan document, or a file that holds one


def compress(
    model: Model,
    output: str | Path,
    options: CompressOptions | None = None,
    *,
    plan: Plan | Edits | None = None,
    tokenizer: Any = None,
    progress: Progress | bool = False,
    **changes: Any,
) -> Report:
    """Pack a model into a seed + coefficient checkpoint.

    Args:
        model: a file, a Hugging Face folder, a hub id, a module or a state dict (see `open_source`).
        output: a file; for a Hugging Face model a folder, with its config (of one in memory, a name that ends in .safetensors
            makes a file). It appears whole or not at all.
        options: see `CompressOptions`.
        plan: a plan to follow, or a plan document or file (see `Plan.to_json`) whose choices win.
        tokenizer: of a transformers model in memory, or its processor: it goes along, and calibration reads text with it.
        progress: True shows bars, with the time that is left; or a function that is called as work is done.
        changes: options by name, as `bits=3`.

    Raises:
        NonfiniteError: naming the tensors.
        OutputError: the output exists or cannot be written; what was there is untouched.
    """
    started = time.perf_counter()
    with (
        shown(progress) as told,
        open_run(model, output, CompressOptions.of(options, changes), told, tokenizer) as run,
    ):
        planned = make_plan(run.source, run.options, plan)
        asked_for = run.options.exclude or plan is not None or run.options.is_raw
        if not planned.packed_weights and not asked_for:
            raise ModelError(_nothing_packed(run.source.name, planned))
        require_room(planned, run.output, run.options.jobs)
        with staged(run.output, force=run.options.force, directory=run.writes_folder) as partial:
            journal = Journal(kept_of(run.output), f"{run.device.type} {run.options.backend}")
            try:
                report = _pack(replace(run, journal=journal), planned, plan, partial)
            except KeyboardInterrupt:
                if len(journal):
                    place = f"kept in {stage_of(run.output)}: the same command goes on from there"
                    told("Interrupted", 0, 0, "", f"{count(len(journal), 'tensor')} {place}")
                raise
    return replace(report, seconds=time.perf_counter() - started)


def _pack(run: Run, plan: Plan, given: Plan | Edits | None, partial: Path) -> Report:
    """Calibrate, fit and write by a plan, as far as runs before have not."""
    plan, statistics = calibrate_plan(run, plan, given)
    run = replace(run, weights=plan.packed_weights)
    assert run.journal is not None
    run.resuming(run.journal.done_before(plan), f"{sum(t.packed for t in plan.tensors)} tensors done")
    if run.options.jobs > 1:
        fit_by_workers(run, plan, statistics)
    return fit_and_write(run, plan, statistics, partial)


def plan(
    model: Model,
    options: CompressOptions | None = None,
    *,
    output: str | Path | None = None,
    edits: Edits | None = None,
    progress: Progress | bool = False,
    **changes: Any,
) -> Plan:
    """Make the plan that `compress` would follow; without a calibration no weight is read.

    Args:
        model: as for `compress`.
        options: see `CompressOptions`. With a calibration a budget is allocated by measured sensitivities.
        output: of the run to come; needed with a calibration, which is kept beside it for that run.
        edits: a plan document or file whose choices win.
        progress: as for `compress`.
        changes: options by name.
    """
    options = CompressOptions.of(options, changes)
    if options.calibrated is None:
        with trusting_remote_code(options.trust_remote_code):
            source = open_source(model, state_key=options.state_key)
        statistics = Statistics(source, options.importance or {})
        planned = make_plan(source, options, edits)
        return planned.with_hessians(statistics.tensors_with_hessian(planned))
    if output is None:
        raise ModelError("name the output that the plan is for: the calibration is kept beside it, for the run to come")
    options = replace(options, calibration=replace(options.calibrated, sequential=False))  # it would fit every layer
    with shown(progress) as told, open_run(model, output, options, told) as run:
        return calibrate_plan(run, make_plan(run.source, options, edits), edits)[0]


def open_run(
    model: Model, output: str | Path, options: CompressOptions, progress: Progress, tokenizer: Any = None
) -> Run:
    """Open the source of a run, and refuse what cannot be done before any work."""
    fitting_device(options.device)
    progress("Reading the model", 0, 0)
    with trusting_remote_code(options.trust_remote_code):
        source = open_source(model, as_file=Path(output).suffix == ".safetensors", state_key=options.state_key)
    if tokenizer is not None:
        source.take_tokenizer(tokenizer)
    run = Run(source, options, Path(output), progress)
    run.check()
    if options.jobs > 1:
        require_reopened(run)
    return run


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
    if not isinstance(codec, Codec):
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

    A budget is allocated once more by measured sensitivities. Calibration in sequence follows the plan; only where it has
    to be measured first the layers' inputs before packing are needed too.
    """
    options, calibration = run.options, run.calibration
    stay_raw = raw_by_value(run, plan, guesses=given is None)
    plan = plan.raw(stay_raw)
    in_sequence = calibration is not None and calibration.sequential
    has_budget = options.target_size is not None or is_budget(plan, options.bits)
    measures = calibration is not None and has_budget and not isinstance(given, Plan)
    if measures or not in_sequence:
        statistics = calibrate(run)
    if measures:
        sensitivities = measured_sensitivities(run, plan, statistics)
        plan = make_plan(run.source, options, given, sensitivities, statistics.tensors_with_hessian(plan))
        plan = plan.raw(stay_raw)
    if in_sequence:
        statistics = calibrate_in_sequence(run, plan)
    plan = plan.with_hessians(statistics.tensors_with_hessian(plan))
    plan.check_experts()
    return plan, statistics


def fit_and_write(run: Run, plan: Plan, statistics: Statistics, partial: Path) -> Report:
    """Fit every tensor of a plan, and write the checkpoint under a name that is not yet the output's."""
    tuned = tune_packed(run, plan, statistics) if run.calibration is not None and run.calibration.tune else None
    planned = [tensor.for_writer() for tensor in plan.tensors]
    folder, shard_bytes, reports = run.writes_folder, run.options.shard_bytes, []
    run.progress("Fitting", 0, run.weights, "weights")
    with CheckpointWriter(partial, planned, plan.shared, WRITER, shard_bytes=shard_bytes) as writer:
        for tensor in plan.tensors:
            parts, report = fit(run if tuned is None else run.quiet(), tensor, statistics)
            if tuned is not None:
                parts, report = apply_tuning(statistics, parts, report, tuned.factors, tuned.values)
            writer.write(tensor.name, {name: to_bytes(part) for name, part in parts.items()})
            if tensor.packed:
                reports.append(report)
    if folder:
        dtype = float_dtype(plan.dtype) if plan.dtype else None
        run.source.complete_output(partial, writer.manifest, dtype)
    run.source.require_unchanged()
    files = partial.glob("*.safetensors") if folder else [partial]
    size = sum(file.stat().st_size for file in files)
    reads_text = run.calibration is not None and run.calibration.is_text
    return Report(
        run.output,
        plan,
        tuple(reports),
        size,
        0.0,
        tuple(run.source.notes),
        run.source.name,
        run.source.input_bytes,
        run.output.parent / FOLDER if reads_text else None,
    )


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
