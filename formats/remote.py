"""Write to remote storage: under a staging name, a finished file at a time, moved into place at the end."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from seedpack.errors import OutputError, first_line
from seedpack.formats.record import RECORD_FILE, file_digest, write_record
from seedpack.formats.staging import exists_already, stage_of

SENT_BYTES = 5_000_000_000  # of a folder's file, by default: it is made here before it is sent
LAST = ("config.json", RECORD_FILE)  # a folder without them is no model yet


class RemoteOutput:
    """An output in remote storage: `path` is a local place to write it to; what is finished is sent and removed here.

    Nothing stands under the output's name before all is there; then the files are copied there inside the storage. A run that is
    killed while it does so leaves no model there: the same command again goes on. Storage has no locks: two runs of one output are
    not kept apart.

    Args:
        target: its address.
        force: replace an existing output, of folders only one that seedpack has written.
        directory: it is a folder.
    """

    def __init__(self, target: Path, *, force: bool, directory: bool):
        self._target: Any = target
        self._force, self._directory = force, directory
        self._new: Any = stage_of(target) / "new"
        self._sent: dict[str, str] = {}  # digests by name
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RemoteOutput:
        self._require_replaceable()
        local = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="seedpack-output-")))
        self.path = local / self._target.name
        if self._directory:
            self.path.mkdir()
        return self

    def send(self, file: Path) -> None:
        """Send a file of the folder, or the file itself, and remove it here.

        Raises:
            OutputError: the storage refuses.
        """
        name = file.relative_to(self.path).as_posix() if self._directory else ""
        self._sent[name] = file_digest(file)
        place = self._new / name if name else self._new
        with _refusals(self._target):
            place.fs.put_file(str(file), place.path)
        file.unlink()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None:
                self._finish()
            else:
                with contextlib.suppress(Exception):
                    _remove(self._new)

    def _finish(self) -> None:
        if self._directory:
            write_record(self.path, self._sent)
        for file in sorted(self.path.rglob("*")) if self._directory else [self.path]:
            if file.is_file():
                self.send(file)
        self._require_replaceable()
        with _refusals(self._target):
            storage, old = self._target.fs, self._own_names()
            self._moving.write_text(json.dumps(sorted(old | self._sent.keys())))
            for name in [name for name in LAST if name in old]:  # what is half replaced is no model
                storage.rm_file((self._target / name).path)
            for name in sorted(self._sent, key=lambda name: (name in LAST, name)):
                place = self._target / name if name else self._target
                storage.copy((self._new / name if name else self._new).path, place.path)
            for name in old - self._sent.keys():
                if storage.exists((self._target / name).path):
                    storage.rm_file((self._target / name).path)
            _remove(stage_of(self._target))

    @property
    def _moving(self) -> Any:
        """The names of files that a run was moving into place, or removing there."""
        return stage_of(self._target) / "moving.json"

    def _own_names(self) -> set[str]:
        """Return the names of the target's files that seedpack has written: by its record, or by a run that was moving them."""
        own = set(json.loads(self._moving.read_bytes())) if self._moving.exists() else set()
        if self._directory and (self._target / RECORD_FILE).exists():
            own |= {RECORD_FILE, *json.loads((self._target / RECORD_FILE).read_bytes())["files"]}
        return own

    def _require_replaceable(self) -> None:
        """Refuse to replace what exists unasked, or what seedpack has not written; but what a killed run was moving is gone on with."""
        with _refusals(self._target):
            self._target.fs.invalidate_cache()
            if not self._target.exists():
                return
            if not self._force and not self._moving.exists():
                raise OutputError(exists_already(self._target))
            top = self._target.path.rstrip("/")
            names = {str(path).removeprefix(top).lstrip("/") for path in self._target.fs.find(top)}
            if self._directory != ("" not in names) or (self._directory and (others := names - self._own_names())):
                what = (
                    f"holds {min(others)!r}, which seedpack did not write"
                    if self._directory and "" not in names
                    else "is of another kind"
                )
                raise OutputError(f"{self._target}: {what}; remove it yourself, or name another output")


def _remove(place: Any) -> None:
    if place.exists():
        place.fs.rm(place.path, recursive=True)


@contextlib.contextmanager
def _refusals(target: object) -> Any:
    try:
        yield
    except OutputError:
        raise
    except Exception as error:  # each storage has its own
        raise OutputError(
            f"{target}: cannot be written ({type(error).__name__}: {first_line(error)}); what is fitted is kept, so run the same "
            "command again"
        ) from error
