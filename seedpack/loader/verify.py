"""Check a checkpoint against its digests and its codecs, at a cost in proportion to its size; and the files beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from seedpack.codecs.registry import codec_from_spec
from seedpack.errors import BackendError, SeedpackError, UnknownCodecError, VersionError
from seedpack.formats import Checkpoint, CodecSpec
from seedpack.formats.manifest import MANIFEST_KEY
from seedpack.formats.record import verify_record
from seedpack.keys import require_same_key
from seedpack.loader.dense import checked_parts, stored_codec
from seedpack.loader.limits import default_limit

LEAST = 50_000_000  # what checking any file may take: about a second
TOO_MUCH = "to decode them takes too long for a file of this size"


@dataclass(frozen=True)
class Verified:
    """The result of checking one tensor, or one file beside the weights.

    Attributes:
        name: of the tensor or the file.
        error: of bytes that changed, or of parts that the codec cannot have written; or None.
        digest_only: why its parts could be checked by their digests alone; or "".
        cost: what it takes to check its parts, beyond their digests (`Codec.checking_cost`), whether it was done or not.
    """

    name: str
    error: SeedpackError | None = None
    digest_only: str = ""
    cost: int = 0
    is_file: bool = False


def verify(checkpoint: Checkpoint) -> Iterator[Verified]:
    """Check every tensor: the digests of its parts, their form, and their elements where that costs no more than the limit.

    Of a folder the files beside its weights are checked too, by the record that seedpack wrote, unless transformers has saved
    it again. No private key is needed for it.

    Raises:
        KeyNeededError: a key is in use, and a tensor was made with another one.
    """
    for spec in checkpoint.manifest.codecs:
        require_same_key(_key_check(spec))
    return _verify(checkpoint)


def _verify(checkpoint: Checkpoint) -> Iterator[Verified]:
    left, absent = default_limit(checkpoint, LEAST).size, [_absent(spec) for spec in checkpoint.manifest.codecs]
    for name, changed in checkpoint.verify():
        error: SeedpackError | None = changed
        cost, reason = 0, absent[checkpoint.manifest.tensors[name].codec]
        if error is None and not reason:
            try:
                codec, shape = stored_codec(checkpoint, name)
                if (cost := codec.checking_cost(shape)) <= left:
                    left -= cost
                    checked_parts(checkpoint, name, codec, shape, digests=False)
                else:
                    reason = TOO_MUCH
            except BackendError as missing:
                reason = str(missing)
            except SeedpackError as problem:
                error = problem
        yield Verified(name, error, reason if error is None else "", cost)
    if checkpoint.path.is_dir() and all(MANIFEST_KEY in file.header.metadata for file in checkpoint.files):
        weights = {file.path.name for file in checkpoint.files}
        for file, damage in verify_record(checkpoint.path, without=weights):
            yield Verified(file, damage, is_file=True)


def _key_check(spec: CodecSpec) -> str:
    """Return the check of the private key that a codec needs, "" where it cannot be told."""
    try:
        return codec_from_spec(spec).key_check
    except (SeedpackError, TypeError, ArithmeticError):  # which is said of each tensor
        return ""


def _absent(spec: CodecSpec) -> str:
    """Return why a codec cannot be used here, or ""."""
    try:
        codec_from_spec(spec)
    except (UnknownCodecError, VersionError) as error:
        return str(error)
    except (SeedpackError, TypeError, ArithmeticError):
        pass  # the file's settings are at fault, which is said of each tensor
    return ""
