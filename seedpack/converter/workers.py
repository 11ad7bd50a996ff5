"""Several processes that fit the tensors of one run: each has its share of the cores, or a GPU of its own, opens the model itself,
and puts what it fits into the run's journal."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import torch

from seedpack.converter.fitting import fit
from seedpack.converter.plan import TensorPlan
from seedpack.converter.run import Run
from seedpack.converter.sources.open import open_source
from seedpack.converter.statistics import Statistics
from seedpack.converter.trust import trusting_remote_code
from seedpack.errors import ModelError
from seedpack.keys import add_key

_work: tuple[Run, Statistics]  # of this process, if it is a worker


def require_reopened(run: Run) -> None:
    """Refuse several workers for a model that each of them cannot open.

    Raises:
        ModelError: it is in memory.
    """
    if not run.source.state:
        raise ModelError(
            f"{run.source.name}: several workers each open the model, and this one is in memory; save it, or leave jobs out"
        )


def fit_by_workers(run: Run, tensors: Sequence[TensorPlan], statistics: Statistics) -> None:
    """Fit packed tensors of a plan, the largest first, by as many processes as the options say.

    Raises:
        ModelError: a worker was killed.
    """
    assert run.journal is not None
    tensors = sorted(tensors, key=lambda tensor: -math.prod(tensor.shape))
    jobs = min(run.options.jobs, len(tensors))
    if jobs < 2:
        return
    run.journal.write_checked()  # not by every worker
    context = multiprocessing.get_context("spawn")
    given = (
        without_process(run),
        run.source.name,
        statistics.moments,
        max(1, torch.get_num_threads() // jobs),
        context.Value("i", 0),
    )
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(*given, os.getpid())) as workers:
        try:
            for done in as_completed([workers.submit(_fit, tensor) for tensor in tensors]):
                tensor = done.result()
                run.progress("Fitting", math.prod(tensor.shape), run.weights, "weights", tensor.name)
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.terminate()
            workers.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise ModelError(
                    "a worker was killed (memory may have run out); run the same command again, with fewer jobs: it goes on from "
                    "there"
                ) from error
            raise
    run.journal.refresh()


def _start(run: Run, name: str, moments: Any, threads: int, count: Any, parent: int) -> None:
    """Open the model in a worker, which ends with its parent, and leaves interrupts to it."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    with count.get_lock():
        number, count.value = count.value, count.value + 1
    if run.device.type == "cuda" and run.device.index is None:
        run = replace(run, options=replace(run.options, device=f"cuda:{number % torch.cuda.device_count()}"))
    own = reopened(run, name)
    _work = own, Statistics(own.source, own.options.importance or {}, moments)


def without_process(run: Run) -> Run:
    """Return what of a run can be sent to another process."""
    return replace(run, source=None, progress=None, locks={}, cluster=None)  # type: ignore[arg-type]


def reopened(run: Run, name: str) -> Run:
    """Return a run that was sent here, with its model opened again by its name."""
    options = run.options
    if options.key is not None:
        add_key(options.key)
    with trusting_remote_code(options.trust_remote_code):
        source = open_source(name, state_key=options.state_key)
    return replace(run, source=source).quiet()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _fit(tensor: TensorPlan) -> TensorPlan:
    run, statistics = _work
    fit(run, tensor, statistics)
    return tensor
