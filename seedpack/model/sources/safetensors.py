"""safetensors files, one tensor in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedpack.dtypes import TORCH_DTYPES
from seedpack.errors import ModelError
from seedpack.formats import SafetensorsFile
from seedpack.formats.manifest import MANIFEST_KEY
from seedpack.model.plan import SourceTensor
from seedpack.model.sources.base import Source, guess_kind

Kinds = Callable[[str, tuple[int, ...]], tuple[str, bool]]


def open_safetensors(
    paths: Sequence[Path], name: str | None = None, kinds: Kinds | None = None, skip: frozenset[str] = frozenset(), **rest: Any
) -> Source:  # fmt: skip
    """The source of one file, or of the shards of one checkpoint.

    Args:
        paths: the files.
        name: for messages; default the first path.
        kinds: (kind, transposed) by name and shape; default by PyTorch's naming.
        skip: names to leave out.
        rest: further fields of `Source`.
    """
    where: dict[str, tuple[Path, int, int]] = {}
    tensors: dict[str, SourceTensor] = {}
    for path in paths:
        file = SafetensorsFile(path)
        file.close()
        if MANIFEST_KEY in file.header.metadata:
            raise ModelError(f"{path}: is packed by seedpack already; seedpack unpack makes it dense")
        for key, info in file.header.tensors.items():
            if key in where:
                raise ModelError(f"{path}: tensor {key!r} stands in {where[key][0].name} too")
            if key in skip:
                continue
            if kinds is None:
                kind, transposed = guess_kind(key, info.dtype, info.shape), False
            else:
                kind, transposed = kinds(key, info.shape)
            where[key] = (path, file.header.data_start + info.start, info.nbytes)
            tensors[key] = SourceTensor(info.dtype, info.shape, kind, transposed)

    def read(key: str) -> Tensor:
        path, start, size = where[key]
        buffer = bytearray(size)
        with open(path, "rb") as file:
            done = os.preadv(file.fileno(), [buffer], start) if size else 0
            while done < size:  # one call reads at most 2 GB
                count = os.preadv(file.fileno(), [memoryview(buffer)[done:]], start + done)
                if not count:
                    raise ModelError(f"{path}: ended while {key!r} was read")
                done += count
        info = tensors[key]
        if not size:
            return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        return torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype]).reshape(info.shape)

    return Source(name or str(paths[0]), tensors, read, **rest)
