"""safetensors files, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from seedpack.converter.sources.base import FileState, KindOf, Source, SourceTensor
from seedpack.converter.sources.kinds import guess_kind
from seedpack.dtypes import TORCH_DTYPES
from seedpack.errors import ModelError
from seedpack.formats.manifest import MANIFEST_KEY
from seedpack.formats.places import read_range
from seedpack.formats.reader import read_header


class SafetensorsSource(Source):
    """One file, or the shards of one checkpoint.

    Args:
        paths: the files, here or in remote storage.
        name: for messages; default the first path.
        kind_of: how a tensor is packed; default by PyTorch's naming.
    """

    def __init__(self, paths: Sequence[Path], name: str | None = None, kind_of: KindOf = guess_kind):
        files = FileState.of_all(paths)
        self._places: dict[str, tuple[Path, int, int]] = {}
        tensors: dict[str, SourceTensor] = {}
        for path in paths:
            header = read_header(path)
            if MANIFEST_KEY in header.metadata:
                raise ModelError(f"{path}: is packed by seedpack already; seedpack unpack makes it dense")
            for key, info in header.tensors.items():
                if key in self._places:
                    raise ModelError(f"{path}: tensor {key!r} stands in {self._places[key][0].name} too")
                self._places[key] = (path, header.data_start + info.start, info.nbytes)
                tensors[key] = SourceTensor(info.dtype, info.shape, *kind_of(key, info.shape))
        super().__init__(name or str(paths[0]), tensors, files=files)

    def _read(self, name: str) -> Tensor:
        path, start, size = self._places[name]
        buffer = read_range(path, start, size)
        if len(buffer) < size:
            raise self._changed(path)
        info = self.tensors[name]
        if not size:
            return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        return torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype]).reshape(info.shape)
