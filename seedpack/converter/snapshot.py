"""The state of long work, kept on disk while it goes on: what an interrupted run begins with instead of nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from seedpack._version import __version__
from seedpack.converter.journal import tensors_digest, write_file
from seedpack.memory import free_bytes

SECONDS = 5.0  # between two states, at least
SHARE = 0.02  # of the time that keeping them may take


class Snapshot:
    """A file of tensors that is replaced from time to time.

    Args:
        path: the file; None keeps nothing.
        key: of all that the state follows from, with the version of seedpack; the state of other work is not taken.

    Attributes:
        done: how much of the work was done, by the work's own count; 0 without a state.
        tensors: the state then.
    """

    def __init__(self, path: Path | None = None, key: str = ""):
        self._path, self._key = path, f"{__version__} {key}"
        self._due = time.monotonic() + SECONDS
        self.done, self.tensors = 0, dict[str, Tensor]()
        if path is None:
            return
        with suppress(Exception), safe_open(path, "pt") as file:  # none, half of one, or another's: from the beginning
            notes = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if notes["key"] == self._key and notes["digest"] == tensors_digest(tensors):
                self.done, self.tensors = int(notes["done"]), tensors

    def keep(self, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state, if it is time to, and if it takes less than half of the memory and the disk that are free.

        Raises:
            OutputError: the disk cannot be written.
        """
        started = time.monotonic()
        if self._path is None or started < self._due:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if 2 * size < min(free_bytes(), shutil.disk_usage(self._path.parent).free):
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            notes = {"key": self._key, "done": str(done), "digest": tensors_digest(kept)}
            write_file(self._path, lambda partial: save_file(kept, partial, notes))
        ended = time.monotonic()
        self._due = ended + max(SECONDS, (ended - started) / SHARE)

    def remove(self) -> None:
        """Remove the file: the work is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
