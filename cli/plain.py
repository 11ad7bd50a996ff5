"""Print to terminals and pipes without UTF-8: what they cannot show is replaced by something readable."""

from __future__ import annotations

import codecs
import sys
import unicodedata
from contextlib import suppress

READABLE = {"→": "->", "×": "x", "…": "...", "–": "-", "—": "-", "─": "-", "━": "-", "│": "|", "‖": "||", "‘": "'", "’": "'", "“": '"', "”": '"'}  # fmt: skip
ERRORS, ASCII = "seedpack-readable", "seedpack_ascii"


def readable(text: str) -> str:
    """Return a text in ASCII.

    >>> readable("3.2 → 3.4×, Ångström ☃")
    '3.2 -> 3.4x, Angstrom ?'
    """
    return "".join(map(_in_ascii, text))


def _in_ascii(character: str) -> str:
    if character.isascii():
        return character
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return READABLE.get(character) or plain or "?"


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return readable(error.object[error.start : error.end]), error.end


def _find_codec(name: str) -> codecs.CodecInfo | None:
    """Give ASCII a second name: click writes UTF-8 to streams of the first, as wrongly configured."""
    if name != ASCII:
        return None
    known = codecs.lookup("ascii")
    return codecs.CodecInfo(
        known.encode, known.decode, known.streamreader, known.streamwriter, known.incrementalencoder,
        known.incrementaldecoder, name,
    )  # fmt: skip


def print_anywhere() -> None:
    """Have standard output and standard error replace what they cannot encode, instead of failing."""
    codecs.register_error(ERRORS, _replace)
    codecs.register(_find_codec)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # closed, or not a stream of text
            encoding = codecs.lookup(stream.encoding or "ascii").name
            if encoding != "utf-8":
                stream.reconfigure(encoding=ASCII if encoding == "ascii" else None, errors=ERRORS)  # type: ignore[union-attr]
