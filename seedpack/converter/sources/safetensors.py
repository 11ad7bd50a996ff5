"""safetensors files, one tensor in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedpack.converter.plan import SourceTensor
from seedpack.converter.sources.base import Kinds, Source, guess_kind
from seedpack.dtypes import TORCH_DTYPES
from seedpack.errors import ModelError
from seedpack.formats import SafetensorsFile
from seedpack.formats.manifest import MANIFEST_KEY


def open_safetensors(paths: Sequence[Path], name: str | None = None, kinds: Kinds = guess_kind, **rest: Any) -> Source:
    """The source of one file, or of the shards of one checkpoint.

    Args:
        paths: the files.
        name: for messages; default the first path.
        kinds: (kind, transposed, group) by name and shape; default by PyTorch's naming.
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
            where[key] = (path, file.header.data_start + info.start, info.nbytes)
            tensors[key] = SourceTensor(info.dtype, info.shape, *kinds(key, info.shape))

    infos = dict(tensors)

    def read(key: str) -> Tensor:
        path, start, size = where[key]
        buffer = bytearray(size)
        with open(path, "rb") as file:
            done = 0
            while done < size:  # one call reads at most 2 GB
                count = os.preadv(file.fileno(), [memoryview(buffer)[done:]], start + done)
                if not count:
                    raise ModelError(f"{path}: ended while {key!r} was read")
                done += count
        info = infos[key]
        if not size:
            return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        return torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype]).reshape(info.shape)

    return Source(name or str(paths[0]), tensors, read, **rest)
