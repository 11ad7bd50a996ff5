"""One run of the converter."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from seedpack.converter.journal import Journal
from seedpack.converter.options import Calibration, CompressOptions, Progress, fitting_device, silent
from seedpack.converter.plan import TensorPlan
from seedpack.converter.sources.base import Source
from seedpack.converter.statistics import Statistics
from seedpack.errors import ModelError
from seedpack.formats.lock import HeldError, locked
from seedpack.formats.places import is_remote
from seedpack.formats.staging import kept_of, require_apart, require_name

FOLDER = "seedpack-calibration"
POLL_SECONDS = 1.0


class Workers(Protocol):
    """Other processes that look at a run's tensors and fit them: `workers.Processes`, or `cluster.Cluster`.

    Attributes:
        streams: tensors are to be submitted as soon as their statistics are known.
    """

    streams: bool

    def look(self, tensors: Iterable[TensorPlan], /) -> Iterable[tuple[TensorPlan, str]]:
        """Look at the values of tensors; see `fitting.look`."""
        ...

    def submit(self, run: Run, tensors: Iterable[TensorPlan], statistics: Statistics, /) -> None:
        """Have tensors fitted, and take what is done."""
        ...

    def finish(self, run: Run, tensors: Iterable[TensorPlan], statistics: Statistics, /) -> None:
        """Have tensors fitted, and wait for all that is being fitted."""
        ...

    def close(self) -> None:
        """Give up what is not done."""
        ...


@dataclass(frozen=True)
class Run:
    """A model, the choices that it is converted by, and the output.

    Attributes:
        source: the model.
        options: the choices.
        output: a file; for a Hugging Face model a folder.
        progress: told of progress.
        weights: to be fitted in all, for progress.
        journal: where fitted tensors are kept until the output stands.
        workers: other processes that look and fit.
        share: the names of the tensors that this run fits, of which others fit the rest; None for all, and none at all where others
            have fitted everything.
        locks: of the folders that this run uses, released when it ends.
    """

    source: Source
    options: CompressOptions
    output: Path
    progress: Progress = silent
    weights: int = 0
    journal: Journal | None = None
    workers: Workers | None = None
    share: frozenset[str] | None = None
    locks: dict[Path, AbstractContextManager[None]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device to run and fit on."""
        return fitting_device(self.options.device)

    @property
    def kind(self) -> str:
        """The kind of device that fits, and the backend: each may round in its own way."""
        return f"{self.device.type} {self.options.backend}"

    @property
    def calibration(self) -> Calibration | None:
        """The calibration, if one is asked for."""
        return self.options.calibrated

    @property
    def writes_folder(self) -> bool:
        """True if the output is a folder."""
        return self.source.config is not None

    @property
    def calibrations(self) -> Path:
        """The folder of calibrations: beside the output, or for one in remote storage the current folder."""
        return (Path() if is_remote(self.output) else self.output.parent) / FOLDER

    @property
    def tuning(self) -> Path:
        """The file that tuning keeps its state in, until the output stands."""
        return (self.calibrations if is_remote(self.output) else kept_of(self.output)) / "tuning.begun"

    def fits(self, tensor: TensorPlan) -> bool:
        """Return whether a tensor is among those that this run fits."""
        return self.share is None or tensor.name in self.share

    def hold(self, folder: Path) -> None:
        """Keep other runs from a folder until this one ends; one that fits only a share waits for its turn.

        Raises:
            OutputError: another run uses it.
        """
        if folder not in self.locks:
            waited = 0
            while True:
                lock = locked(
                    folder, f"{folder}: another run is calibrating with it", "name an output in another folder"
                )
                try:
                    lock.__enter__()
                except HeldError as held:
                    if self.share is None:
                        raise
                    if waited == 0:
                        self.progress("Waiting", 0, 0, "", f"waiting for the shard that calibrates: {held}")
                    waited += 1
                    time.sleep(POLL_SECONDS)
                else:
                    break
            self.locks[folder] = lock

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.release(is_interrupted=kind is KeyboardInterrupt)
        if self.workers is not None:
            self.workers.close()
        self.source.give_back()

    def release(self, *folders: Path, is_interrupted: bool = False) -> None:
        """Let other runs have folders that this one kept from them; without any, all."""
        for folder in folders or tuple(self.locks):
            self.locks.pop(folder).__exit__(None, None, None)
            if is_interrupted and folder.exists():  # with a calibration, or the beginning of one
                text = f"calibration kept in {folder}: the same command goes on from there"
                self.progress("Interrupted", 0, 0, "", text)

    def resuming(self, done: int, goal: str) -> None:
        """Say what earlier runs have done, if anything, of a goal such as "30 layers calibrated"."""
        if done:
            self.progress("Resuming", 0, 0, "", f"resuming: {done} of {goal}")

    def quiet(self) -> Run:
        """Return this run without progress."""
        return replace(self, progress=silent)

    def check(self) -> None:
        """Refuse what cannot be done before any work.

        Raises:
            ModelError: the output cannot be what the model becomes, or an option does not fit the model.
        """
        if is_remote(self.output) or is_remote(self.source.name):
            if f"{self.source.name}/".startswith(f"{self.output}/"):
                raise ModelError(f"{self.output}: is the model itself or holds it; name another output")
        else:
            require_apart(self.output, Path(self.source.name))
        require_name(self.output, is_folder=self.writes_folder)
        if self.writes_folder and self.output.suffix == ".safetensors":
            raise ModelError(f"{self.output}: a Hugging Face model becomes a folder; name one without .safetensors")
        if self.options.shard_bytes and not self.writes_folder:
            raise ModelError("only a Hugging Face folder is split into shards; leave the shard size out")
        if self.calibration is not None and type(self.source).open_model is Source.open_model:
            self.source.open_model()  # which refuses
