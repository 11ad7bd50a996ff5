"""Warnings and logged lines of foreign code, kept from the screen."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any


class Lines(logging.Handler):
    """Keeps what transformers logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def listening(work: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return the result of a call, and what it warned of, each on one line."""
    handler, logger = Lines(), logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = work()
    finally:
        logger.removeHandler(handler)
    messages = [*handler.lines, *(str(warning.message) for warning in caught)]
    return result, [" ".join(message.split())[:300] for message in messages]
