"""Mixtures of experts: on disk one matrix an expert and projection, in memory one 3-D parameter for all of them.

A packed experts module keeps, for each projection, its codec's parts stacked over the experts. The 3-D parameter's
place is taken by a view that decodes one expert when it is indexed, which is all that transformers' own ("eager")
forward pass does; so that pass stays as it is, for every architecture.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.codecs.base import Codec
from seedpack.codecs.registry import codec_from_spec, codec_to_json
from seedpack.errors import ModelError
from seedpack.formats import Manifest
from seedpack.hf.checkpoint_names import CheckpointNames
from seedpack.loader import ops
from seedpack.loader.layers import empty_part


@dataclass(frozen=True)
class ExpertGroup:
    """One projection of one experts module: `count` matrices of one shape under one codec."""

    module: str
    parameter: str
    projection: str
    codec: Codec
    shape: tuple[int, int]
    count: int

    @property
    def part_names(self) -> list[str]:
        """The codec's parts."""
        return list(self.codec.parts(self.shape))

    def leaf(self, part: str) -> str:
        """Name of the stacked parameter of a part."""
        return f"{self.projection}_{part}"

    def patterns(self, part: str) -> tuple[str, str]:
        """Names on disk and in memory, as transformers' weight converters take them."""
        return f".experts.*.{self.projection}.{part}", f".experts.{self.leaf(part)}"


class ExpertView:
    """Stands for a 3-D expert parameter: indexing decodes one expert's matrix."""

    def __init__(self, module: nn.Module, groups: list[ExpertGroup], dtype: torch.dtype):
        self._module, self._groups, self.dtype = module, groups, dtype
        self.shape = torch.Size((groups[0].count, sum(g.shape[0] for g in groups), groups[0].shape[1]))

    def __getitem__(self, index: Any) -> Tensor:
        if not isinstance(index, int) and not (isinstance(index, Tensor) and index.numel() == 1):
            raise ModelError("packed experts are decoded one at a time: use experts_implementation='eager'")
        return torch.cat([self._decode(group, int(index)) for group in self._groups])

    def dense(self) -> Tensor:
        """The whole parameter [experts, out, in]."""
        return torch.stack([self[i] for i in range(self.shape[0])])

    def _decode(self, group: ExpertGroup, index: int) -> Tensor:
        parts = {part: self._module.get_parameter(group.leaf(part))[index] for part in group.part_names}
        return ops.decode(parts, codec_to_json(group.codec), group.shape, self.dtype)


class PackedExperts(nn.Module):
    """What packed experts modules have beside their architecture's own class."""

    compute_dtype: torch.dtype
    groups: dict[str, list[ExpertGroup]]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _view(module: PackedExperts, parameter: str) -> ExpertView:
    return ExpertView(module, module.groups[parameter], module.compute_dtype)


def check_experts(module: nn.Module) -> None:
    """Refuse parts that the codec cannot have written, expert by expert."""
    if isinstance(module, PackedExperts):
        for group in (group for groups in module.groups.values() for group in groups):
            stacked = {part: module.get_parameter(group.leaf(part)) for part in group.part_names}
            for index in range(group.count):
                group.codec.check({part: value[index] for part, value in stacked.items()}, group.shape)


def pack_experts_(
    model: nn.Module, path: str, names: list[str], skeleton: CheckpointNames, manifest: Manifest, dtype: torch.dtype
) -> list[ExpertGroup]:
    """Turn the experts module at `path` into its packed form, in place, its parts unfilled."""
    module = model.get_submodule(path)
    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        expert = skeleton.expert(name)
        assert expert is not None
        members[expert.parameter, expert.projection].append(name)
    views: dict[str, list[ExpertGroup]] = defaultdict(list)
    for parameter in sorted({parameter for parameter, _ in members}):
        dense = module.get_parameter(parameter)
        sample = next(names[0] for (owner, _), names in members.items() if owner == parameter)
        for projection in skeleton.projections(sample):
            group_names = members.get((parameter, projection), [])
            specs = {(manifest.tensors[n].shape, manifest.tensors[n].codec) for n in group_names}
            if len(group_names) != dense.shape[0] or len(specs) != 1:
                raise ModelError(
                    f"{path}.{parameter}: experts of one parameter must all be packed by one codec; {projection} has "
                    f"{len(group_names)} of {dense.shape[0]} packed, in {len(specs)} ways"
                )
            entry = manifest.tensors[group_names[0]]
            if len(entry.shape) != 2 or entry.transposed or entry.shape[1] != dense.shape[2]:
                raise ModelError(f"{group_names[0]!r}: shape {list(entry.shape)} does not fit {list(dense.shape)}")
            codec = codec_from_spec(manifest.codec_of(group_names[0]))
            group = ExpertGroup(path, parameter, projection, codec, (entry.shape[0], entry.shape[1]), dense.shape[0])
            views[parameter].append(group)
            for part, (kind, shape) in codec.parts(group.shape).items():
                value = empty_part(kind, (group.count, *shape), dense.device)
                module.register_parameter(group.leaf(part), nn.Parameter(value, requires_grad=False))
        del module._parameters[parameter]
    properties = {parameter: property(partial(_view, parameter=parameter)) for parameter in views}
    dense_class = type(module)
    module.__class__ = type(f"Packed{dense_class.__name__}", (PackedExperts, dense_class), properties)
    assert isinstance(module, PackedExperts)
    module.compute_dtype, module.groups = dtype, dict(views)
    module._is_hf_initialized = True  # type: ignore[assignment]  # transformers must not draw random weights for it
    return [group for groups in views.values() for group in groups]


def unpack_experts_(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Make every packed experts module dense again, in place."""
    for module in list(model.modules()):
        if not isinstance(module, PackedExperts):
            continue
        dense = {parameter: getattr(module, parameter).dense() for parameter in module.groups}
        for groups in module.groups.values():
            for group in groups:
                for part in group.part_names:
                    del module._parameters[group.leaf(part)]
        del module.groups, module.compute_dtype
        module.__class__ = type(module).__mro__[2]
        for parameter, value in dense.items():
            module.register_parameter(parameter, nn.Parameter(value if dtype is None else value.to(dtype)))
