"""Every exception that seedpack raises on purpose. Standard library only.

    SeedpackError
    ├── FormatError          the bytes of a checkpoint break a rule of docs/format.md
    │   ├── NotPackedError   there are weights, but seedpack has not packed them
    │   ├── VersionError     written by a newer seedpack
    │   └── DigestError      a part's or the manifest's bytes changed since they were written
    ├── CodecError           a codec's hyperparameters, parts or shapes do not fit
    │   └── UnknownCodecError
    ├── ModelError           a source model or a target module cannot be used as asked
    │   └── NonfiniteError   NaN or Inf weights
    ├── OptionError          an option's value is not possible, or options exclude each other; both of the two above
    ├── LimitError           decoding would take more than the limit allows
    ├── KeyNeededError       a private key is missing, wrong or malformed
    ├── OutputError          the output cannot be written
    └── BackendError         a backend cannot run here, or needs a package that is not installed

Each message says what, where, found and expected, and a remedy.
"""

from __future__ import annotations

import textwrap


class SeedpackError(Exception):
    """The root of the tree; `except SeedpackError` catches all that seedpack raises on purpose."""


class FormatError(SeedpackError, ValueError):
    """The bytes of a checkpoint break a rule of `docs/format.md`."""


class NotPackedError(FormatError):
    """There are weights, but seedpack has not packed them."""


class VersionError(FormatError):
    """The checkpoint or one of its codecs is of a version that this seedpack does not know."""


class DigestError(FormatError):
    """Bytes differ from the digest stored when they were written."""


class CodecError(SeedpackError, ValueError):
    """A codec's hyperparameters, parts or shapes do not fit."""


class UnknownCodecError(CodecError):
    """No codec of that id is registered."""


class ModelError(SeedpackError, ValueError):
    """A source model or a target module cannot be used as asked."""


class NonfiniteError(ModelError):
    """A weight to be packed holds NaN or Inf."""


class OptionError(CodecError, ModelError):
    """An option's value is not possible, or options exclude each other; the command line's exit code is 2."""


class LimitError(SeedpackError, ValueError):
    """Decoding would take more memory or time than the limit allows; `max_bytes` raises it."""


class KeyNeededError(SeedpackError, ValueError):
    """A private key is missing, is another one than the file was made with, or is malformed."""


class OutputError(SeedpackError, OSError):
    """The output cannot be written: it exists, or the disk is full."""


class BackendError(SeedpackError, RuntimeError):
    """A backend cannot run here, or needs a package that is not installed."""


def first_line(error: BaseException) -> str:
    """Return the first line of a foreign exception's message, for one line of ours."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return textwrap.shorten(line, 200, placeholder=" …") if len(line) > 200 else line
