"""The stored form of a module in memory: packed layers, weights trained in a random subspace, and all other tensors raw."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from seedpack._version import WRITER
from seedpack.codecs.base import Codec
from seedpack.codecs.raw import RawCodec
from seedpack.dtypes import dtype_name, find_shared, to_bytes
from seedpack.errors import ModelError
from seedpack.formats import CheckpointWriter, PlannedTensor, View, staged
from seedpack.formats.staging import require_name
from seedpack.loader.layers import PackedModule, codec_matrix, memory_name
from seedpack.loader.parameters import PackedParameters
from seedpack.loader.trained import Coefficients, Piece, SeededModule, StoredTensor, bases_of, joined, tensor_name


@dataclass
class StoredForm:
    """A module as a file holds it.

    Attributes:
        parts: by tensor.
        planned: the tensors, in file order.
        views: tensors that are pieces of stored ones.
        seeded: whether some of its weights are trained in a random subspace.
    """

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    planned: list[PlannedTensor] = field(default_factory=list)
    views: dict[str, View] = field(default_factory=dict)
    seeded: bool = False

    def add(
        self,
        name: str,
        codec: Codec,
        dtype: str,
        shape: tuple[int, ...],
        parts: dict[str, Tensor],
        transposed: bool = False,
    ) -> None:
        """Add a tensor under a codec."""
        matrix = codec_matrix(shape, transposed)
        if parts.keys() != codec.parts(matrix).keys():
            raise ModelError(
                f"{name!r} holds the first levels of its coefficients alone; load the whole file to save it"
            )
        self.parts[name] = parts
        self.planned.append(PlannedTensor(name, codec.spec(), dtype, shape, codec.parts(matrix), transposed))

    def add_parameters(self, prefix: str, module: PackedParameters) -> set[str]:
        """Add the packed parameters of a module; return the names of their parts in memory."""
        names = set()
        for leaf, pieces in module.pieces.items():
            if len(pieces) > 1:
                raise ModelError(
                    f"{joined(prefix, leaf)!r} is made of several tensors; save the model by save_pretrained"
                )
            parts, dtype = module.packed_parts(pieces[0]), dtype_name(module.compute_dtype)
            names |= {joined(prefix, name) for name in pieces[0].names.values()}
            piece = pieces[0]
            self.add(joined(prefix, leaf), piece.codec, dtype, piece.shape, parts, piece.transposed)
        return names

    def add_seeded(self, name: str, tensor: StoredTensor) -> None:
        """Add a tensor that is trained in a random subspace; such weights are float32."""
        self.seeded = True
        self.add(name, tensor.codec, "F32", tensor.shape, tensor.parts)


def stored_form(model: nn.Module) -> StoredForm:
    """Return the stored form of a module."""
    form, bases = StoredForm(), bases_of(model)
    own = set(bases.names)  # names of the state whose tensors a codec stores
    stored_as = {id(basis): name for name, basis in bases.stored.items()}
    for name, basis in bases.stored.items():
        form.add_seeded(name, basis.to_parts())
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule):
            parts = module.packed_parts()
            own |= {joined(prefix, memory_name(part)) for part in parts}
            dtype = dtype_name(module.compute_dtype)
            form.add(joined(prefix, "weight"), module.codec, dtype, module.weight_shape, parts, module.transposed)
        elif isinstance(module, PackedParameters):
            own |= form.add_parameters(prefix, module)
        elif isinstance(module, Coefficients):
            own.add(joined(prefix, "coefs"))
            form.add_seeded(joined(prefix, "weight"), module.to_parts())
        elif isinstance(module, ParametrizationList) and any(isinstance(p, (Piece, SeededModule)) for p in module):
            first, name = module[0], tensor_name(prefix)
            if len(module) != 1:
                raise ModelError(f"{name!r} has other parametrisations beside seedpack's; remove them before saving")
            own |= {joined(prefix, key) for key in module.state_dict()}
            if isinstance(first, Piece):
                form.views[name] = replace(first.piece, tensor=stored_as[id(first.basis)])
            elif isinstance(first, SeededModule):
                form.add_seeded(name, first.to_parts(module))
    for name, tensor in model.state_dict().items():
        if name not in own:
            form.parts[name] = {"weight": tensor}
            form.planned.append(raw_planned(name, dtype_name(tensor.dtype), tuple(tensor.shape)))
    return form


def raw_planned(name: str, dtype: str, shape: tuple[int, ...]) -> PlannedTensor:
    """Return a tensor stored as it is."""
    codec = RawCodec(dtype)
    return PlannedTensor(name, codec.spec(), dtype, shape, codec.parts(shape))


def save_module(model: nn.Module, path: Path, *, force: bool = False) -> None:
    """Save a module with packed layers; see `seedpack.save`."""
    stored = stored_form(model)
    save_pretrained: Any = getattr(model, "save_pretrained", None)
    if save_pretrained is not None and not stored.seeded:
        with staged(path, force=force, directory=True) as partial:
            save_pretrained(partial)
        return
    require_name(path)
    shared = find_shared((name, parts["weight"]) for name, parts in stored.parts.items())
    with staged(path, force=force) as partial:
        planned = [tensor for tensor in stored.planned if tensor.name not in shared]
        with CheckpointWriter(partial, planned, shared, WRITER, views=stored.views) as writer:
            for tensor in planned:
                writer.write(tensor.name, {part: to_bytes(value) for part, value in stored.parts[tensor.name].items()})
