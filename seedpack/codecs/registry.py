"""Codec ids to classes: seedpack's own and third parties' by the entry-point group `seedpack.codecs`."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.metadata import entry_points

from seedpack.codecs.base import Codec
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.field import FieldCodec
from seedpack.codecs.mask import MaskCodec
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.errors import CodecError, UnknownCodecError, VersionError
from seedpack.formats import CodecSpec
from seedpack.formats.header import dumps_canonical

_REGISTRY: dict[str, type[Codec]] = {}


def register_codec(codec: type[Codec]) -> type[Codec]:
    """Make a codec class known under its `id`; usable as a decorator. Another class of that id is refused."""
    if _REGISTRY.setdefault(codec.id, codec) is not codec:
        raise CodecError(f"codec id {codec.id!r} is taken by {_REGISTRY[codec.id].__qualname__}; choose another")
    return codec


def get_codec(id: str) -> type[Codec]:
    """The codec class of an id.

    Raises:
        UnknownCodecError: none is registered; the message lists those that are.
    """
    if not isinstance(id, str) or id not in _REGISTRY:
        for entry in entry_points(group="seedpack.codecs", name=id):
            return register_codec(entry.load())
        raise UnknownCodecError(
            f"unknown codec {id!r}; known: {', '.join(codec_ids())}; install the package that provides it"
        )
    return _REGISTRY[id]


def codec_ids() -> list[str]:
    """All known ids."""
    return sorted(_REGISTRY.keys() | {entry.name for entry in entry_points(group="seedpack.codecs")})


def codec_from_spec(spec: CodecSpec) -> Codec:
    """The codec that a file names.

    Raises:
        VersionError: its layout is newer than (or, while experimental, other than) what is implemented here.
    """
    codec = get_codec(spec.id)
    if spec.version != codec.version:
        remedy = "upgrade seedpack" if spec.version > codec.version else "pack the model again"
        raise VersionError(f"codec {spec.id!r}: the file has version {spec.version}, here is {codec.version}; {remedy}")
    return codec.from_config(spec.config)


@lru_cache(maxsize=256)
def codec_from_json(text: str) -> Codec:
    """The codec of `codec_to_json`'s text; for operators, whose arguments are strings and tensors."""
    value = json.loads(text)
    return codec_from_spec(CodecSpec(value["id"], value["version"], value["config"]))


def codec_to_json(codec: Codec) -> str:
    """The canonical JSON of a codec's spec."""
    return dumps_canonical(codec.spec().to_json())


def _register_own() -> None:
    from seedpack.codecs.svd import SVDCodec  # imports this module, to look its factors' codec up

    for codec in (BasisCodec, FieldCodec, MaskCodec, RawCodec, SeedLMCodec, SVDCodec, TrellisCodec):
        register_codec(codec)


_register_own()
