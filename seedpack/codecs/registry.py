"""Codec ids and their classes: seedpack's own, and those of other rooms and packages by the entry-point group `seedpack.codecs`."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import import_module

from seedpack.codecs.base import Codec
from seedpack.codecs.names import OWN, REGISTRY, plugins
from seedpack.codecs.names import codec_ids as codec_ids
from seedpack.errors import CodecError, UnknownCodecError, VersionError
from seedpack.formats import CodecSpec
from seedpack.formats.header import dumps_canonical


def register_codec(codec: type[Codec]) -> type[Codec]:
    """Make a codec class known under its `id`; usable as a decorator. Another class of that id is refused."""
    if (known := _known(codec.id) or codec) is not codec:
        raise CodecError(f"codec id {codec.id!r} is taken by {known.__qualname__}; choose another")
    REGISTRY[codec.id] = codec
    return codec


def get_codec(id: str) -> type[Codec]:
    """Return the codec class of an id.

    Raises:
        UnknownCodecError: none is registered; the message lists those that are.
    """
    if isinstance(id, str):
        if (known := _known(id)) is not None:
            return known
        if id in (others := plugins()):
            return register_codec(others[id].load())
    raise UnknownCodecError(
        f"unknown codec {id!r}; known: {', '.join(codec_ids())}; install the package that provides it"
    )


def _known(id: str) -> type[Codec] | None:
    """Return the class that is registered under an id, or seedpack's own of that id."""
    if id in OWN and id not in REGISTRY:
        module, _, name = OWN[id].partition(":")
        REGISTRY[id] = getattr(import_module(module), name)
    return REGISTRY.get(id)


def codec_from_spec(spec: CodecSpec) -> Codec:
    """Return the codec that a file names.

    Raises:
        VersionError: its layout is newer than (or, while experimental, other than) what is implemented here.
    """
    codec = get_codec(spec.id)
    if codec.parts is Codec.parts or codec.decode is Codec.decode:
        raise CodecError(f"codec {spec.id!r} cannot decode; install another version of the package that provides it")
    if spec.version not in {codec.version, *codec.older}:
        remedy = "upgrade seedpack" if spec.version > codec.version else "pack the model again"
        raise VersionError(f"codec {spec.id!r}: the file has version {spec.version}, here is {codec.version}; {remedy}")
    found = codec.from_config(spec.config)
    if (version := found.spec().version) != spec.version:
        raise VersionError(
            f"codec {spec.id!r}: the file has version {spec.version}, but its settings are of version {version}; "
            "the file is corrupt"
        )
    return found


def nested_codec(owner: str, setting: str, value: object) -> Codec:
    """Return the codec that a setting of another codec names: its id, version and config.

    Args:
        owner: id of the other codec, for messages.
        setting: its name, for messages.
        value: of the setting.
    """
    if not isinstance(value, dict) or value.keys() != {"id", "version", "config"}:
        raise CodecError(f"{owner}: {setting} must be a codec's id, version and config")
    if not isinstance(value["id"], str) or type(value["version"]) is not int:
        raise CodecError(f"{owner}: {setting} must name a codec's id and version")
    if value["id"] == owner:
        raise CodecError(f"{owner}: {setting} cannot be {owner} again")
    if not get_codec(value["id"]).nestable:  # so that codecs nest twice at most
        raise CodecError(f"{owner}: {setting} cannot be {value['id']}; name a codec of single matrices, as trellis")
    return codec_from_spec(CodecSpec(value["id"], value["version"], value["config"]))


@lru_cache(maxsize=256)
def codec_from_json(text: str) -> Codec:
    """Return the codec of `codec_to_json`'s text; for operators, whose arguments are strings and tensors."""
    value = json.loads(text)
    return codec_from_spec(CodecSpec(value["id"], value["version"], value["config"]))


def codec_to_json(codec: Codec) -> str:
    """Return the canonical JSON of a codec's spec."""
    return dumps_canonical(codec.spec().to_json())
