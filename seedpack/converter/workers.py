"""Several processes that look at and fit the tensors of one run: each has its share of the cores, or a GPU of its own, opens the model
itself, and puts what it fits into the run's journal."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from seedpack.converter.fitting import fit, look, look_at
from seedpack.converter.journal import Journal
from seedpack.converter.plan import TensorPlan
from seedpack.converter.run import Run
from seedpack.converter.sources.open import open_source
from seedpack.converter.statistics import SecondMoments, Statistics
from seedpack.converter.threads import use_threads
from seedpack.converter.trust import trusting_remote_code
from seedpack.errors import ModelError
from seedpack.keys import add_key


def require_reopened(run: Run) -> None:
    """Refuse several workers for a model that each of them cannot open.

    Raises:
        ModelError: it is in memory.
    """
    if not run.source.files:
        raise ModelError(
            f"{run.source.name}: several workers each open the model, and this one is in memory; save it, or leave jobs out"
        )


class Processes:
    """The processes of one run, on this machine; they begin with the first work.

    Args:
        run: whose model can be opened by its name.
    """

    streams = False  # while it is calibrated, the model takes all cores

    def __init__(self, run: Run):
        self._run = run
        self._pool: ProcessPoolExecutor | None = None
        self._place = tempfile.TemporaryDirectory(prefix="seedpack-workers-")  # of their own temporary folders

    def look(self, tensors: Iterable[TensorPlan]) -> Iterator[tuple[TensorPlan, str]]:
        """Look at the values of tensors; see `fitting.look`."""
        tensors = list(tensors)
        if len(tensors) < 2:
            yield from look_at(self._run.source, tensors)
        else:
            yield from self._done({self._workers().submit(_look, tensor): tensor for tensor in tensors})

    def submit(self, run: Run, tensors: Iterable[TensorPlan], statistics: Statistics) -> None:
        """Do nothing yet."""

    def finish(self, run: Run, tensors: Iterable[TensorPlan], statistics: Statistics) -> None:
        """Fit tensors, the largest first, into the run's journal.

        Raises:
            ModelError: a worker was killed.
        """
        tensors = sorted(tensors, key=lambda tensor: -math.prod(tensor.shape))
        if len(tensors) < 2:
            return
        journal = run.journal
        assert journal is not None
        journal.write_checked()  # not by every worker
        place = journal.folder, journal.kind, journal.state
        tasks = {self._workers().submit(_fit, tensor, place, statistics.moments): tensor for tensor in tensors}
        for tensor, _ in self._done(tasks):
            run.progress("Fitting", math.prod(tensor.shape), run.weights, "weights", tensor.name)
        journal.refresh()

    def _workers(self) -> ProcessPoolExecutor:
        if self._pool is None:
            jobs, context = self._run.options.jobs, multiprocessing.get_context("spawn")
            threads = max(1, torch.get_num_threads() // jobs)
            given = (
                without_process(self._run),
                self._run.source.local_name,
                self._place.name,
                threads,
                context.Value("i", 0),
                os.getpid(),
            )
            self._pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=given)
        return self._pool

    def _done(self, tasks: dict[Future[Any], TensorPlan]) -> Iterator[tuple[TensorPlan, Any]]:
        try:
            for task in as_completed(tasks):
                yield tasks[task], task.result()
        except BrokenProcessPool as error:
            raise ModelError(
                "a worker was killed (memory may have run out); run the same command again, with fewer jobs: it goes on from there"
            ) from error

    def close(self) -> None:
        """Give up what is not done."""
        if self._pool is not None:
            for process in list(self._pool._processes.values() if self._pool._processes else ()):
                process.terminate()
            self._pool.shutdown(cancel_futures=True)
        self._place.cleanup()


def without_process(run: Run) -> Run:
    """Return what of a run can be sent to another process."""
    return replace(run, source=None, progress=None, locks={}, workers=None)  # type: ignore[arg-type]


def reopened(run: Run, name: str) -> Run:
    """Return a run that was sent here, with its model opened again by its name."""
    options = run.options
    if options.key is not None:
        add_key(options.key)
    with trusting_remote_code(options.trust_remote_code):
        source = open_source(name, state_key=options.state_key)
    return replace(run, source=source).quiet()


_own: Run  # of this process, if it is a worker


def _start(run: Run, name: str, place: str, threads: int, count: Any, parent: int) -> None:
    """Open the model in a worker, which ends with its parent, and leaves interrupts to it."""
    global _own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    use_threads(threads)
    tempfile.tempdir = place
    with count.get_lock():
        number, count.value = count.value, count.value + 1
    if run.device.type == "cuda" and run.device.index is None:
        run = replace(run, options=replace(run.options, device=f"cuda:{number % torch.cuda.device_count()}"))
    _own = reopened(run, name)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _look(tensor: TensorPlan) -> str:
    return look(_own.source.read(tensor.name))


def _fit(tensor: TensorPlan, place: tuple[Path, str, str], moments: SecondMoments) -> None:
    global _own
    if _own.journal is None:
        _own = replace(_own, journal=Journal(*place))
    fit(_own, tensor, Statistics(_own.source, _own.options.importance or {}, moments))
