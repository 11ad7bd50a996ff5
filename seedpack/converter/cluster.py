"""Tensors fitted by the workers of a Ray cluster: what they fit comes back to the run, which keeps it in its journal.

Each task reads its own tensor, from a file system or remote storage that all machines see. A task whose worker or machine dies runs
again elsewhere.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from seedpack.converter.estimate import WORKSPACE, bytes_to_fit
from seedpack.converter.fitting import fit, look
from seedpack.converter.journal import Entry, Journal
from seedpack.converter.plan import TensorPlan
from seedpack.converter.report import TensorReport
from seedpack.converter.run import Run
from seedpack.converter.statistics import Statistics
from seedpack.converter.threads import use_threads
from seedpack.converter.workers import reopened, without_process
from seedpack.errors import BackendError, ModelError, SeedpackError, first_line

Work = tuple[Run, str, str]  # as sent: without its source, which has a name and a state
CONNECT_SECONDS = 10
RETRIES = 5  # of a task whose worker dies


class Cluster:
    """The tasks of one run, whose model workers can open by its name.

    Args:
        run: the run.
    """

    streams = True

    def __init__(self, run: Run):
        self._ray, self._gpus = _connected(run.options.address), int(run.device.type == "cuda")
        self._tasks: dict[Any, TensorPlan] = {}
        self._submitted: set[str] = set()
        self._run = self._ray.put((without_process(run), run.source.name, run.source.state))
        nodes = [node["Resources"].get("memory", 0) for node in self._ray.nodes() if node["Alive"]]
        self._memory = int(max(nodes, default=0))

    def _task(self, function: Callable[..., object], tensor: TensorPlan) -> Any:
        needed = min(self._memory, WORKSPACE + bytes_to_fit(tensor))
        options = {"num_cpus": 1, "num_gpus": self._gpus, "memory": needed, "max_retries": RETRIES}
        return self._ray.remote(**options)(function)

    def look(self, tensors: Iterable[TensorPlan]) -> Iterator[tuple[TensorPlan, str]]:
        """Look at the values of tensors; see `fitting.look`."""
        tasks = {self._task(_look, tensor).remote(self._run, tensor): tensor for tensor in tensors}
        while tasks:
            done, _ = self._ray.wait(list(tasks))
            yield tasks.pop(done[0]), self._result(done[0])

    def submit(self, run: Run, tensors: Iterable[TensorPlan], statistics: Statistics) -> None:
        """Have tensors fitted, the largest first, but those that are being fitted already; take what is done."""
        for tensor in sorted(tensors, key=lambda tensor: -math.prod(tensor.shape)):
            if tensor.name not in self._submitted:
                self._submitted.add(tensor.name)
                moments = {
                    name: value
                    for name in run.source.parameters(tensor.name)
                    if (value := statistics.moments.get(name)) is not None
                }
                self._tasks[self._task(_fit, tensor).remote(self._run, tensor, moments)] = tensor
        self._collect(run, wait=False)

    def finish(self, run: Run, tensors: Iterable[TensorPlan], statistics: Statistics) -> None:
        """Have tensors fitted, and wait for all that is being fitted.

        Raises:
            ModelError: a task failed, or its workers died too often.
        """
        self.submit(run, tensors, statistics)
        self._collect(run, wait=True)

    def _collect(self, run: Run, *, wait: bool) -> None:
        assert run.journal is not None
        while self._tasks:
            done, _ = self._ray.wait(list(self._tasks), timeout=None if wait else 0)
            if not done:
                return
            tensor = self._tasks.pop(done[0])
            run.journal.put(*self._result(done[0]))
            run.progress("Fitting", math.prod(tensor.shape), run.weights, "weights", tensor.name)

    def _result(self, task: Any) -> Any:
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (
                cause if isinstance(cause, SeedpackError) else ModelError(f"a worker failed: {first_line(cause)}")
            ) from None
        except self._ray.exceptions.RayError as error:
            raise ModelError(
                f"the workers of a tensor died {1 + RETRIES} times (memory may have run out: {first_line(error)}); run the same "
                "command again: it goes on from there"
            ) from error

    def close(self) -> None:
        """Give up what is not done, and leave the cluster."""
        for task in self._tasks:
            self._ray.cancel(task, force=True)
        self._ray.shutdown()


def _connected(address: str | None) -> Any:
    """Return Ray, connected to a cluster.

    Raises:
        BackendError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError:
        raise BackendError("engine ray: Ray is not installed; pip install 'seedpack-torch[ray]'") from None
    where = address or os.environ.get("RAY_ADDRESS", "auto")
    host, _, port = where.rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()  # Ray itself would try for minutes
        ray.init(where, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise BackendError(
            f"engine ray: no cluster to join ({first_line(error)}); start one with ray start --head, or name its address"
        ) from None
    return ray


class _Outbox(Journal):
    """Takes one entry, to be sent."""

    sent: tuple[Any, ...]

    def refresh(self) -> None:
        self._of_place, self._of_bytes = {}, {}

    def at_place(self, tensor: TensorPlan, measured: Any) -> Entry | None:
        return None

    def put(self, place: str, name: str, parts: Mapping[str, Tensor], report: TensorReport) -> None:
        self.sent = place, name, {part: value.cpu() for part, value in parts.items()}, report


_opened: dict[str, Run] = {}  # in a worker, whose process serves many tasks


def _open(work: Work) -> Run:
    """Return the run in a worker, with its model opened: once for as long as its files are the same."""
    use_threads(1)
    run, name, state = work
    if state not in _opened:
        _opened.clear()
        again = reopened(run, name)
        if again.source.state != state or not state:
            raise ModelError(f"{name}: a worker finds other files there; name storage that all machines share")
        _opened[state] = again
    return replace(_opened[state], options=run.options)


def _look(work: Work, tensor: TensorPlan) -> str:
    return look(_open(work).source.read(tensor.name))


def _fit(work: Work, tensor: TensorPlan, moments: Mapping[str, Tensor]) -> tuple[Any, ...]:
    run = _open(work)
    outbox = _Outbox(Path(), run.kind, run.source.state)
    fit(replace(run, journal=outbox), tensor, Statistics(run.source, run.options.importance or {}, moments))
    return outbox.sent
