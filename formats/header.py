"""The safetensors header: eight length bytes, one JSON object, then the tensors' bytes without holes.

Reads headers from anyone, checked in full before anything is allocated; writes them in one canonical
form, so that the same tensors give the same bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from seedpack.errors import FormatError
from seedpack.formats.foreign import foreign_kind

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32
MAX_DEPTH = 64  # of JSON
_LEVEL = re.compile(r"(?:^|[._])more_([1-9][0-9]{0,2})$")
DTYPE_BYTES = (
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 2)
    | dict.fromkeys(("U32", "I32", "F32"), 4)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 8)
)


@dataclass(frozen=True)
class TensorInfo:
    """Dtype, shape and place of a stored tensor: `start` and `end` are byte offsets into the data behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A checked header. `data_start` is the file offset of the first tensor's first byte."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the size of a tensor in bytes.

    >>> nbytes("F16", (3, 5))
    30
    """
    return DTYPE_BYTES[dtype] * math.prod(shape)


def loads_strict(text: str, where: str) -> Any:
    """Parse JSON, refusing duplicate keys, NaN and deep nesting with a `FormatError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise FormatError(f"{where}: duplicate key {key[:80]!r} in one JSON object")
            result[key] = value
        return result

    def constant(name: str) -> Any:
        raise FormatError(f"{where}: {name} is not JSON")

    try:
        document = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON ({type(error).__name__}: {str(error)[:120]})") from None
    _require_shallow(document, where)
    return document


def _require_shallow(document: Any, where: str) -> None:
    """Refuse nesting that functions which follow it could not bear."""
    level = [document] if isinstance(document, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        members = chain.from_iterable(value.values() if isinstance(value, dict) else value for value in level)
        level = [value for value in members if isinstance(value, (dict, list))]
        if not level:
            return
    raise FormatError(f"{where}: JSON is nested more than {MAX_DEPTH} deep")


def dumps_canonical(value: Any) -> str:
    """Return the canonical JSON text of a value: keys sorted, no spaces, only what must be escaped is."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def header_length(prefix: bytes, file_bytes: int, where: str) -> int:
    """Return the length of the JSON text, from the first eight bytes, checked against the size of the file."""
    if file_bytes < 8 or len(prefix) < 8:
        raise FormatError(f"{where}: {file_bytes} bytes is too short for a safetensors file; was it truncated?")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        kind = foreign_kind(prefix)
        found = f"is {kind}" if kind else f"its header would take {length} bytes, at most {MAX_HEADER_BYTES} allowed"
        raise FormatError(f"{where}: not a safetensors file ({found})")
    if 8 + length > file_bytes:
        raise FormatError(
            f"{where}: header of {length} bytes does not fit a file of {file_bytes}; the file is truncated"
        )
    return length


def level_of(key: str) -> int:
    """Return the level of a part: N for a name that ends in more_N, which refines lower levels, else 0 (M5, M26).

    >>> level_of("a.b.more_2"), level_of("right_more_1"), level_of("a.b.weight")
    (2, 1, 0)
    """
    match = _LEVEL.search(key)
    return int(match[1]) if match else 0


def parse_header(text: bytes, file_bytes: int, where: str, *, whole: bool = True) -> Header:
    """Check a header's JSON against the safetensors rules and the size of the file.

    Args:
        text: the JSON text, without the eight length bytes.
        file_bytes: size of the whole file.
        where: the file's name, for messages.
        whole: False takes a file that was cut off at its end too.

    Raises:
        FormatError: naming the tensor and the rule that is broken.
    """
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: the header is not UTF-8 (byte {error.start})") from None
    if not decoded.startswith("{"):
        raise FormatError(f"{where}: the header must begin with '{{'; is this a safetensors file?")
    document = loads_strict(decoded, where)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{where}: __metadata__ must map strings to strings")
    tensors = {name: _tensor_info(name, value, where) for name, value in document.items()}
    _check_coverage(tensors, file_bytes - 8 - len(text), where, whole)
    return Header(tensors, metadata, 8 + len(text))


def _tensor_info(name: str, value: object, where: str) -> TensorInfo:
    at = f"{where}: tensor {name[:120]!r}"
    check_name(name, at)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{at}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FormatError(f"{at}: unknown dtype {str(dtype)[:40]!r}; known: {', '.join(DTYPE_BYTES)}")
    check_shape(shape, at)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise FormatError(f"{at}: data_offsets must be two whole numbers, got {str(offsets)[:80]}")
    info = TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])
    if not 0 <= info.start <= info.end:
        raise FormatError(f"{at}: data_offsets {offsets} do not ascend from 0")
    expected = nbytes(dtype, shape)
    if info.nbytes != expected:
        raise FormatError(f"{at}: {dtype} {shape} takes {expected} bytes, data_offsets give {info.nbytes}")
    return info


def check_name(name: str, at: str) -> None:
    """Refuse a name that UTF-8 cannot hold, or that is the key of the metadata."""
    if name == "__metadata__" or any("\ud800" <= character <= "\udfff" for character in name):
        raise FormatError(f"{at}: not a valid tensor name; rename the tensor")


def check_shape(shape: object, at: str) -> None:
    """Require a list of at most `MAX_DIMENSIONS` whole numbers, whose product, zeros left out, is below 2^63."""
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise FormatError(f"{at}: shape must be a list of whole numbers, got {str(shape)[:80]}")
    if len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) >= 2**63:
        raise FormatError(f"{at}: a shape of {len(shape)} axes, {str(shape)[:80]}, is too large for any tensor")


def _check_coverage(tensors: Mapping[str, TensorInfo], data_bytes: int, where: str, whole: bool) -> None:
    """Require the tensors to tile the data: no hole, no overlap, nothing after the end."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            kind = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            raise FormatError(
                f"{where}: tensor {name[:120]!r} {kind}: starts at byte {info.start}, expected {position}"
            )
        position = info.end
    if position != data_bytes and (whole or position < data_bytes):
        kind = "the file is truncated" if position > data_bytes else "bytes follow that belong to no tensor"
        raise FormatError(f"{where}: the tensors take {position} bytes, the file holds {data_bytes}; {kind}")


def layout(parts: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Lay tensors out in the canonical order: widest dtype first (so that all are aligned), then by level and name.

    >>> layout({"b": ("U8", (3,)), "a": ("F32", (1,))})["b"].start
    4
    """
    for name in parts:
        check_name(name, f"tensor {name[:120]!r}")
    infos, position = {}, 0
    for name in sorted(parts, key=lambda name: (-DTYPE_BYTES[parts[name][0]], level_of(name), name)):
        dtype, shape = parts[name]
        infos[name] = TensorInfo(dtype, tuple(shape), position, position + nbytes(dtype, shape))
        position = infos[name].end
    return infos


def serialise_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return the canonical header, length bytes included, padded with spaces to a multiple of eight."""
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    for name, info in tensors.items():
        document[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.start, info.end],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(
            f"header of {len(text)} bytes, at most {MAX_HEADER_BYTES} allowed; write more, smaller shards"
        )
    return len(text).to_bytes(8, "little") + text
