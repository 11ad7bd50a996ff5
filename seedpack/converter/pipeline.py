"""The way through the converter: open, plan, calibrate, fit, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from seedpack._version import WRITER
from seedpack.converter.calibration.calibrate import forget_own
from seedpack.converter.calibration.packed import tune_packed
from seedpack.converter.estimate import require_room
from seedpack.converter.fitting import apply_tuning, fit, fit_all
from seedpack.converter.journal import Journal
from seedpack.converter.options import CompressOptions, Progress, fitting_device, float_dtype
from seedpack.converter.plan import Plan
from seedpack.converter.planning import Edits, calibrate_plan, make_plan, plan_of
from seedpack.converter.progress import shown
from seedpack.converter.report import Report, TensorReport
from seedpack.converter.run import Run
from seedpack.converter.shards import Shard, require_fitted, shards_kept_out
from seedpack.converter.sources.open import Model, open_source
from seedpack.converter.statistics import Statistics
from seedpack.converter.trust import trusting_remote_code
from seedpack.converter.usual import with_usual_calibration
from seedpack.converter.workers import Processes, require_reopened
from seedpack.dtypes import to_bytes
from seedpack.errors import ModelError, OutputError, first_line
from seedpack.formats import CheckpointWriter, staged
from seedpack.formats.lock import locked
from seedpack.formats.places import is_remote, place
from seedpack.formats.remote import SENT_BYTES, RemoteOutput
from seedpack.formats.staging import kept_of, stage_of
from seedpack.units import count

Finished = Callable[[Path], None]


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
    return _compress(model, output, CompressOptions.of(options, changes), plan, tokenizer, progress)


def merge(
    model: Model,
    output: str | Path,
    options: CompressOptions | None = None,
    *,
    plan: Plan | Edits | None = None,
    fitted_on: str = "cpu",
    progress: Progress | bool = False,
    **changes: Any,
) -> Report:
    """Write the checkpoint whose tensors shards have fitted (see `fit_shard`).

    Args:
        model: as the shards'.
        output: as the shards'.
        options: as the shards'; the device may be another.
        plan: as the shards'.
        fitted_on: the kind of the shards' devices, "cpu" or "cuda".
        progress: as for `compress`.
        changes: options by name.

    Raises:
        ModelError: tensors are not fitted yet, with the shards that they belong to.
    """
    options = _for_shards(CompressOptions.of(options, changes))
    return _compress(model, output, options, plan, None, progress, fitted_on)


def fit_shard(
    model: Model,
    output: str | Path,
    options: CompressOptions | None = None,
    *,
    shard: Shard,
    plan: Plan | Edits | None = None,
    progress: Progress | bool = False,
    **changes: Any,
) -> list[TensorReport]:
    """Fit one share of a model's tensors, and keep them beside the output for `merge`; other processes fit the others.

    All need the same model, options and storage. Of a calibration one of them runs the model, and the others wait for it.

    Args:
        model: as for `compress`; not one in memory.
        output: as for `compress`; nothing is written there.
        options: as for `compress`.
        shard: which share.
        plan: as for `compress`.
        progress: as for `compress`.
        changes: options by name.

    Returns:
        The reports of the share's tensors.

    Raises:
        OutputError: the output stands already, or the same shard is being fitted.
    """
    options = _for_shards(CompressOptions.of(options, changes))
    with shown(progress) as told, open_run(model, output, options, told) as run:
        shard.require_possible(run)
        planned = plan_of(run, plan)
        folder = stage_of(run.output)
        lock = (
            nullcontext()
            if is_remote(run.output)
            else locked(folder / f"shard-{shard.number}", *shard.refusal(run.output))
        )
        journal = _journal(run)
        with lock, _saying_what_is_kept(run, journal):
            run = replace(run, journal=journal, share=shard.of(planned))
            followed, statistics = calibrate_plan(run, planned, plan)
            run.release()
            tensors = tuple(tensor for tensor in followed.tensors if tensor.packed and run.fits(tensor))
            part = replace(followed, tensors=tensors, shared={})
            run = replace(run, weights=part.packed_weights)
            fit_all(run, part, statistics)
            run.progress("Fitting", 0, run.weights, "weights")
            reports = [fit(run, tensor, statistics)[1] for tensor in tensors]
            run.source.require_unchanged()
    return reports


def _for_shards(options: CompressOptions) -> CompressOptions:
    """Return options of shards: no calibration that each machine would decide by its memory, and no sequence that nobody asked for."""
    calibration = options.calibrated
    if calibration is not None:
        calibration = replace(calibration, sequential=bool(calibration.sequential))
    return replace(options, calibration=calibration)


def _compress(
    model: Model,
    output: str | Path,
    options: CompressOptions,
    plan: Plan | Edits | None,
    tokenizer: Any,
    progress: Progress | bool,
    fitted_on: str | None = None,
) -> Report:
    started = time.perf_counter()
    with shown(progress) as told, open_run(model, output, options, told, tokenizer) as run:
        planned = plan_of(run, plan)
        require_room(planned, run.output, run.options.jobs)
        with _staged(run) as (partial, finished):
            journal = _journal(run, fitted_on)
            run = replace(run, journal=journal, share=None if fitted_on is None else frozenset())
            with _saying_what_is_kept(run, journal):
                run, followed, statistics = _calibrated(run, planned, plan)
                run = replace(run, weights=followed.packed_weights)
                if fitted_on is not None:
                    require_fitted(run, followed, statistics)
                fit_all(run, followed, statistics)
                report = fit_and_write(run, followed, statistics, partial, finished)
        run.tuning.unlink(missing_ok=True)
        stays = forget_own(run)
    calibration = run.calibrations if stays else None
    return replace(report, seconds=time.perf_counter() - started, calibration=calibration)


def _calibrated(run: Run, planned: Plan, plan: Plan | Edits | None) -> tuple[Run, Plan, Statistics]:
    """Calibrate; where nobody has asked for it and it cannot be done, say so and do not."""
    try:
        return run, *calibrate_plan(run, planned, plan)
    except Exception as error:  # of a model's own code too
        if run.calibration is None or not run.calibration.is_usual or isinstance(error, OutputError):
            raise
        forget_own(run)
        run.progress("Calibrating", 0, 0, "", f"not calibrated: {first_line(error)}")
        run = replace(run, options=replace(run.options, calibration=None))
        return run, *calibrate_plan(run, planned, plan)


def _journal(run: Run, fitted_on: str | None = None) -> Journal:
    kind = run.kind if fitted_on is None else f"{fitted_on} {run.options.backend}"
    return Journal(kept_of(run.output), kind, run.source.state)


@contextmanager
def _saying_what_is_kept(run: Run, journal: Journal) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if len(journal):
            kept = f"kept in {stage_of(run.output)}: the same command goes on from there"
            run.progress("Interrupted", 0, 0, "", f"{count(len(journal), 'tensor')} {kept}")
        raise


@contextmanager
def _staged(run: Run) -> Iterator[tuple[Path, Finished | None]]:
    """Yield where to write the output, and what takes a file that is whole from there."""
    if is_remote(run.output):
        with RemoteOutput(run.output, force=run.options.force, directory=run.writes_folder) as stage:
            yield stage.path, stage.send
    else:
        with (
            staged(run.output, force=run.options.force, directory=run.writes_folder) as partial,
            shards_kept_out(run.output),
        ):
            yield partial, None


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
        options: see `CompressOptions`. A budget is allocated by the sizes of tensors; only a run that packs measures.
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
        source = open_source(model, as_file=place(output).suffix == ".safetensors", state_key=options.state_key)
    if tokenizer is not None:
        source.take_tokenizer(tokenizer)
    options = with_usual_calibration(source, options)
    run = Run(source, options, place(output), progress)
    run.check()
    if options.jobs > 1 or options.engine == "ray":
        require_reopened(run)
    if options.engine == "ray":
        from seedpack.converter.cluster import Cluster

        return replace(run, workers=Cluster(run))
    return replace(run, workers=Processes(run)) if options.jobs > 1 else run


def fit_and_write(
    run: Run, plan: Plan, statistics: Statistics, partial: Path, finished: Finished | None = None
) -> Report:
    """Fit every tensor of a plan, and write the checkpoint under a name that is not yet the output's.

    Args:
        run: the run.
        plan: its plan.
        statistics: to fit with.
        partial: the file, or the existing folder.
        finished: as for `CheckpointWriter`.
    """
    tuned = tune_packed(run, plan, statistics) if run.calibration is not None and run.calibration.tune else None
    planned = [tensor.for_writer() for tensor in plan.tensors]
    folder, shard_bytes, reports = run.writes_folder, run.options.shard_bytes, []
    run.progress("Fitting", 0, run.weights, "weights")
    if finished is not None and folder:
        shard_bytes = shard_bytes or SENT_BYTES
    with CheckpointWriter(partial, planned, plan.shared, WRITER, shard_bytes=shard_bytes, finished=finished) as writer:
        for tensor in plan.tensors:
            parts, report = fit(run if tuned is None else run.quiet(), tensor, statistics)
            if tuned is not None:
                parts, report = apply_tuning(statistics, parts, report, tuned.factors, tuned.values)
            writer.write(tensor.name, {name: to_bytes(part) for name, part in parts.items()})
            del parts  # before the next tensor is read
            if tensor.packed:
                reports.append(report)
    if folder:
        dtype = float_dtype(plan.dtype) if plan.dtype else None
        run.source.complete_output(partial, writer.manifest, dtype)
    run.source.require_unchanged()
    return Report(
        run.output,
        plan,
        tuple(reports),
        writer.file_bytes,
        0.0,
        tuple(run.source.notes),
        run.source.name,
        run.source.input_bytes,
        None,
        run.workers is not None,
    )
