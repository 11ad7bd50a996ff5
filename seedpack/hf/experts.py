"""Mixtures of experts: on disk one matrix per expert and projection, in memory one 3-D parameter for all of them.

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
from seedpack.hf.internals import mark_initialised
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
        """Names of the codec's parts."""
        return list(self.codec.parts(self.shape))

    def leaf(self, part: str) -> str:
        """Return the name of the stacked parameter of a part."""
        return f"{self.projection}_{part}"

    def patterns(self, part: str) -> tuple[str, str]:
        """Return a part's names on disk and in memory, as transformers' weight converters take them."""
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
        """Return the whole parameter [experts, out, in]."""
        return torch.stack([self[i] for i in range(self.shape[0])])

    def _decode(self, group: ExpertGroup, index: int) -> Tensor:
        parts = {part: self._module.get_parameter(group.leaf(part))[index] for part in group.part_names}
        return ops.decode(parts, codec_to_json(group.codec), group.shape, self.dtype)


class PackedExperts(nn.Module):
    """Base of packed experts modules, beside their architecture's own class.

    Attributes:
        compute_dtype: of decoded weights.
        groups: by the dense parameter that they make up, in the order of its rows.
    """

    compute_dtype: torch.dtype
    groups: dict[str, list[ExpertGroup]]

    def all_groups(self) -> list[ExpertGroup]:
        """Return the groups of all parameters."""
        return [group for groups in self.groups.values() for group in groups]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _view(module: PackedExperts, parameter: str) -> ExpertView:
    return ExpertView(module, module.groups[parameter], module.compute_dtype)


def check_experts(module: nn.Module) -> None:
    """Refuse parts that the codec cannot have written, expert by expert."""
    if isinstance(module, PackedExperts):
        for group in module.all_groups():
            stacked = {part: module.get_parameter(group.leaf(part)) for part in group.part_names}
            for index in range(group.count):
                group.codec.check({part: value[index] for part, value in stacked.items()}, group.shape)


def pack_experts_(
    model: nn.Module,
    path: str,
    names: list[str],
    checkpoint_names: CheckpointNames,
    manifest: Manifest,
    dtype: torch.dtype,
) -> list[ExpertGroup]:
    """Turn the experts module at `path` into its packed form, in place, its parts unfilled.

    Args:
        model: of transformers, on any device.
        path: the module's.
        names: the packed tensors of its experts, as the checkpoint has them.
        checkpoint_names: of the model.
        manifest: of the checkpoint.
        dtype: of decoded weights.
    """
    module = model.get_submodule(path)
    members: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        expert = checkpoint_names.expert(name)
        assert expert is not None
        members[expert.parameter][expert.projection].append(name)
    groups: dict[str, list[ExpertGroup]] = {}
    for parameter, by_projection in sorted(members.items()):
        dense = module.get_parameter(parameter)
        projections = checkpoint_names.projections(next(iter(by_projection.values()))[0])
        groups[parameter] = [
            _expert_group(path, parameter, projection, by_projection[projection], dense, manifest)
            for projection in projections
        ]
        for group in groups[parameter]:
            for part, (part_dtype, shape) in group.codec.parts(group.shape).items():
                value = empty_part(part_dtype, (group.count, *shape), dense.device)
                module.register_parameter(group.leaf(part), nn.Parameter(value, requires_grad=False))
        del module._parameters[parameter]
    properties = {parameter: property(partial(_view, parameter=parameter)) for parameter in groups}
    dense_class = type(module)
    module.__class__ = type(f"Packed{dense_class.__name__}", (PackedExperts, dense_class), properties)
    assert isinstance(module, PackedExperts)
    module.compute_dtype, module.groups = dtype, groups
    mark_initialised(module)
    return module.all_groups()


def _expert_group(
    path: str, parameter: str, projection: str, names: list[str], dense: Tensor, manifest: Manifest
) -> ExpertGroup:
    """Return the group of one projection; all experts must have the same shape and codec."""
    count = dense.shape[0]
    forms = {(manifest.tensors[name].shape, manifest.tensors[name].codec) for name in names}
    if len(names) != count or len(forms) != 1:
        raise ModelError(
            f"{path}.{parameter}: experts of one parameter must all be packed by one codec; {projection} has "
            f"{len(names)} of {count} packed, in {len(forms)} ways"
        )
    entry = manifest.tensors[names[0]]
    if len(entry.shape) != 2 or entry.transposed or entry.shape[1] != dense.shape[2]:
        raise ModelError(f"{names[0]!r}: shape {list(entry.shape)} does not fit {list(dense.shape)}")
    codec = codec_from_spec(manifest.codec_of(names[0]))
    return ExpertGroup(path, parameter, projection, codec, (entry.shape[0], entry.shape[1]), count)


def unpack_experts_(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Make every packed experts module dense again, in place."""
    for module in [module for module in model.modules() if isinstance(module, PackedExperts)]:
        dense = {parameter: getattr(module, parameter).dense() for parameter in module.groups}
        for group in module.all_groups():
            for part in group.part_names:
                del module._parameters[group.leaf(part)]
        del module.groups, module.compute_dtype
        module.__class__ = type(module).__mro__[2]
        for parameter, value in dense.items():
            module.register_parameter(parameter, nn.Parameter(value if dtype is None else value.to(dtype)))
