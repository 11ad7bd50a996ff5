"""The targets: each takes any bytes, and ends in a value or in one of seedpack's own errors, soon and in little memory.

An input of the first ones is the text or the file itself. For the others it is a program of changes to files that are sound
(`draws.py`), whose digests are made right again, so that what lies behind them is reached.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from seedpack.codecs.registry import codec_ids
from seedpack.errors import SeedpackError
from tests.fuzz import codecs, containers, documents

Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {
    "header-text": containers.header_text,
    "manifest-text": containers.manifest_text,
    "file": containers.file,
    "header": containers.header,
    "manifest": containers.manifest,
    "checkpoint": containers.checkpoint,
    "folder": containers.folder,
    "plan": documents.plan,
    "journal": documents.journal,
    "config": documents.config,
    "coder": codecs.coder,
    **{f"codec-{id}": partial(codecs.codec, id) for id in codec_ids()},
}


def run(target: str, data: bytes) -> None:
    """Give a target an input; errors of seedpack's own are an answer."""
    try:
        TARGETS[target](data)
    except SeedpackError as error:
        str(error).encode("utf-8", "surrogateescape")
