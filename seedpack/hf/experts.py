"""Mixtures of experts: on disk one matrix per expert and projection, in memory one 3-D parameter for all of them.

A packed experts module keeps, for each projection, its codec's parts stacked over the experts, as the codec `stack` has them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seedpack.codecs.registry import codec_from_spec
from seedpack.codecs.stack import StackCodec
from seedpack.errors import ModelError
from seedpack.formats import Manifest
from seedpack.hf.checkpoint_names import CheckpointNames
from seedpack.hf.internals import mark_initialised
from seedpack.loader.parameters import Piece, pack_parameter_


@dataclass(frozen=True)
class ExpertGroup:
    """One projection of one experts module: matrices of one shape under one codec, in memory one piece of a parameter."""

    module: str
    parameter: str
    piece: Piece

    def patterns(self) -> dict[str, str]:
        """Return the parts' names on disk and in memory, as transformers' weight converters take them."""
        projection = self.piece.prefix
        return {f".experts.*.{projection}.{part}": f".experts.{name}" for part, name in self.piece.names.items()}


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
    groups = []
    for parameter, by_projection in sorted(members.items()):
        dense = module.get_parameter(parameter)
        projections = checkpoint_names.projections(next(iter(by_projection.values()))[0])
        pieces = [_piece(f"{path}.{parameter}", p, by_projection[p], dense, manifest) for p in projections]
        pack_parameter_(module, parameter, [(piece, None) for piece in pieces], dtype)
        groups += [ExpertGroup(path, parameter, piece) for piece in pieces]
    mark_initialised(module)
    return groups


def _piece(where: str, projection: str, names: list[str], dense: Tensor, manifest: Manifest) -> Piece:
    """Return the piece of one projection; all experts must have the same shape and codec."""
    count = dense.shape[0]
    forms = {(manifest.tensors[name].shape, manifest.tensors[name].codec) for name in names}
    if len(names) != count or len(forms) != 1:
        raise ModelError(
            f"{where}: experts of one parameter must all be packed by one codec; {projection} has "
            f"{len(names)} of {count} packed, in {len(forms)} ways"
        )
    entry = manifest.tensors[names[0]]
    if len(entry.shape) != 2 or entry.transposed or entry.shape[1] != dense.shape[2]:
        raise ModelError(f"{names[0]!r}: shape {list(entry.shape)} does not fit {list(dense.shape)}")
    codec = StackCodec.over(codec_from_spec(manifest.codec_of(names[0])), *entry.shape)
    return Piece(projection, codec, (count, *entry.shape))
