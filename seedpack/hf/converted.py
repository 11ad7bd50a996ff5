"""Tensors that transformers merges, splits or transposes while it loads them, as they are in memory then.

They are packed in that form, under the model's own names: so loading a packed checkpoint has nothing to convert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from seedpack.converter.sources.base import Source, SourceTensor
from seedpack.dtypes import TORCH_DTYPES, dtype_name
from seedpack.hf.checkpoint_names import CheckpointNames
from seedpack.hf.internals import convert


class ConvertedSource(Source):
    """A checkpoint whose tensors are converted where transformers does so; experts that it merely stacks stay apart.

    Args:
        source: the checkpoint.
        names: of the model.
    """

    def __init__(self, source: Source, names: CheckpointNames):
        self._source, self._names = source, names
        self._groups: dict[str, tuple[str, list[str]]] = {}  # by the model's name: the first of the group, its tensors
        stored = source.named
        self._patterns = {name: pattern for name in stored if (pattern := names.converted_by(name)) is not None}
        tensors = {name: tensor for name, tensor in source.tensors.items() if name not in self._patterns}
        shared = {
            alias: name for alias, name in source.shared.items() if alias not in self._patterns and name in tensors
        }
        members: dict[str, list[str]] = defaultdict(list)
        for name in self._patterns:
            members[names.parameter(name)[0]].append(name)
        for first, group in members.items():
            forms = self._convert(first, {name: _on_meta(stored[name]) for name in group})
            if any(names.shape(name) != tuple(form.shape) for name, form in forms.items()):
                forms = {}
            if not forms:  # another form of the checkpoint than the model's: it is loaded, or refused, as it is
                tensors |= {name: stored[name] for name in group}
            size = sum(stored[name].source_bytes for name in group)
            for name, form in forms.items():
                self._groups[name] = first, group
                share = size * form.numel() // max(1, sum(other.numel() for other in forms.values()))
                tensors[name] = SourceTensor(dtype_name(form.dtype), tuple(form.shape), stored_bytes=share)
        own = names.restricted(tensors)
        super().__init__(
            source.name,
            {name: replace(tensor, **own.kind(name, tensor.shape)._asdict()) for name, tensor in tensors.items()},
            shared=shared,
            dropped=source.dropped,
            files=source.files,
            notes=source.notes,
        )

    def _read(self, name: str) -> Tensor:
        if name not in self._groups:
            return self._read_stored(name)
        first, group = self._groups[name]
        return self._convert(first, {member: self._read_stored(member) for member in group})[name].contiguous()

    def _read_stored(self, name: str) -> Tensor:
        return self._source._read(self._source.shared.get(name, name))

    def _convert(self, first: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converter = self._names.converter(self._patterns[next(iter(tensors))])
        return convert(
            self._names.model,
            converter,
            first,
            {name: (self._patterns[name], value) for name, value in tensors.items()},
        )


def _on_meta(tensor: SourceTensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device="meta")
