"""The records of cases, kept in a file of JSON so that a sweep goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.lib import models


class Results:
    """Records by case, of one set of versions: those of others are not gone on with.

    Args:
        file: that they are kept in.
        fresh: begin anew.
    """

    def __init__(self, file: Path, fresh: bool = False):
        self._file, self._versions = file, models.versions()
        self.records: dict[str, dict[str, Any]] = {}
        if file.is_file() and not fresh:
            document = json.loads(file.read_text("utf-8"))
            if document["versions"] == self._versions:
                self.records = document["cases"]
            else:
                print(f"{file}: measured with {document['versions']}; begun anew", flush=True)

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps({"versions": self._versions, "cases": self.records}, indent=1), "utf-8")
        partial.replace(self._file)
