"""One run of the converter."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from seedpack.converter.journal import Journal
from seedpack.converter.options import Calibration, CompressOptions, Progress, fitting_device, silent
from seedpack.converter.sources.base import Source
from seedpack.errors import ModelError
from seedpack.formats.lock import locked
from seedpack.formats.staging import require_apart, require_name


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
        locks: of the folders that this run uses, released when it ends.
    """

    source: Source
    options: CompressOptions
    output: Path
    progress: Progress = silent
    weights: int = 0
    journal: Journal | None = None
    locks: dict[Path, AbstractContextManager[None]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device to run and fit on."""
        return fitting_device(self.options.device)

    @property
    def calibration(self) -> Calibration | None:
        """The calibration, if one is asked for."""
        return self.options.calibrated

    @property
    def writes_folder(self) -> bool:
        """True if the output is a folder."""
        return self.source.config is not None

    def hold(self, folder: Path) -> None:
        """Keep other runs from a folder until this one ends.

        Raises:
            OutputError: another run uses it.
        """
        if folder not in self.locks:
            lock = locked(folder, f"{folder}: another run is calibrating with it", "name an output in another folder")
            lock.__enter__()
            self.locks[folder] = lock

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        while self.locks:
            folder, lock = self.locks.popitem()
            lock.__exit__(None, None, None)
            if kind is KeyboardInterrupt and folder.exists():  # with a calibration, or the beginning of one
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
        require_apart(self.output, Path(self.source.name))
        require_name(self.output, is_folder=self.writes_folder)
        if self.writes_folder and self.output.suffix == ".safetensors":
            raise ModelError(f"{self.output}: a Hugging Face model becomes a folder; name one without .safetensors")
        if self.options.shard_bytes and not self.writes_folder:
            raise ModelError("only a Hugging Face folder is split into shards; leave the shard size out")
        if self.calibration is not None and type(self.source).open_model is Source.open_model:
            self.source.open_model()  # which refuses
