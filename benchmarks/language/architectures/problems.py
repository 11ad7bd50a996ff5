"""Problems of a case, and attempts that become one where they raise."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import seedpack
import seedpack.formats
from benchmarks.language.architectures.models import described
from benchmarks.language.architectures.time_limit import TimedOut

OURS = {str(Path(folder).resolve()) for folder in (*seedpack.__path__, *seedpack.formats.__path__)}


class FailedError(Exception):
    """A step raised without which a case cannot go on."""

    def __init__(self, kind: str, text: str, place: str = ""):
        super().__init__(text)
        self.kind, self.text, self.place = kind, text, place


class Problems:
    """Adds problems to a record."""

    def __init__(self, found: list[dict[str, str]]):
        self.found = found

    def add(self, kind: str, text: str, place: str = "") -> None:
        """Add a problem: its kind, what it is, and where it was raised."""
        self.found.append({"kind": kind, "text": text[:700], "place": place})

    def add_error(self, kind: str, error: BaseException, label: str = "") -> None:
        """Add an error as a problem."""
        self.add(kind, f"{label}: {described(error)}" if label else described(error), place_of(error))


def attempt(kind: str, work: Callable[[], Any]) -> Any:
    """Return the result of a call; whatever it raises becomes a `FailedError` of a kind."""
    try:
        return work()
    except TimedOut as error:
        raise FailedError("timeout", f"{kind}: {error}") from error
    except Exception as error:
        raise FailedError(kind, described(error), place_of(error)) from error


def place_of(error: BaseException) -> str:
    """Return where an error was raised, and before it the last place in seedpack, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if any(frame.filename.startswith(folder) for folder in OURS)]
    places = [(ours or frames)[-1], frames[-1]]
    texts = [f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in places]
    return " < ".join(dict.fromkeys(texts))
