"""Tensors that transformers merges, splits or transposes while it loads them, as they are in memory then.

They are packed in that form, under the model's own names: so loading a packed checkpoint has nothing to convert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

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
        self._source, self._model = source, names.model
        self._groups: dict[str, tuple[str, list[str]]] = {}  # by the model's name: the first of the group, its tensors
        self._patterns = {name: pattern for name in source.tensors if (pattern := names.converted_by(name)) is not None}
        tensors = {name: tensor for name, tensor in source.tensors.items() if name not in self._patterns}
        members: dict[str, list[str]] = defaultdict(list)
        for name in self._patterns:
            members[names.parameter(name)[0]].append(name)
        for first, group in members.items():
            forms = self._convert(first, {name: _on_meta(source.tensors[name]) for name in group})
            if any(names.shape(name) != tuple(form.shape) for name, form in forms.items()):
                forms = {}
            if not forms:  # another form of the checkpoint than the model's: it is loaded, or refused, as it is
                tensors |= {name: source.tensors[name] for name in group}
            for name, form in forms.items():
                self._groups[name] = first, group
                tensors[name] = SourceTensor(dtype_name(form.dtype), tuple(form.shape))
        own = names.restricted(tensors)
        tensors |= {name: SourceTensor(t.dtype, t.shape, *own.kind(name, t.shape)) for name, t in tensors.items()}
        super().__init__(
            source.name, tensors, shared=source.shared, config=source.config, dropped=source.dropped, files=source.files
        )

    def _read(self, name: str) -> Tensor:
        if name not in self._groups:
            return self._source._read(name)
        first, group = self._groups[name]
        return self._convert(first, {member: self._source._read(member) for member in group})[name].contiguous()

    def _convert(self, first: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return convert(self._model, first, {name: (self._patterns[name], value) for name, value in tensors.items()})


def _on_meta(tensor: SourceTensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device="meta")
