"""What every source offers, and the source of tensors that are in memory already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedpack.converter.plan import SourceTensor
from seedpack.dtypes import dtype_name
from seedpack.errors import ModelError


@dataclass
class Source:
    """A model's tensors, read one at a time.

    Attributes:
        name: where they come from, for messages.
        tensors: in file order.
        read: gives one tensor on the CPU; nothing of it stays in memory here.
        shared: further names of some tensors.
        config: the Hugging Face config.json, or None for anything else.
        files: further files of a Hugging Face folder to be copied (tokenizer, licence, …).
        dropped: what the file held beside tensors, for a note.
        power: the power of each input channel of a layer, by its weight's name, where a norm before it tells [in].
        parameters: names in the model of a tensor, that of its parameter first, then those tied to it.
        fingerprint: digest of all tensors and the config, once it is known.
        opened: makes the model to run, and its tokenizer if it has one; None where there is nothing to run.
    """

    name: str
    tensors: dict[str, SourceTensor]
    read: Callable[[str], Tensor]
    shared: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    files: list[Path] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    power: Callable[[str], Tensor | None] = lambda name: None
    parameters: Callable[[str], list[str]] = lambda name: [name]
    opened: Callable[[], tuple[Any, Any]] | None = None
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ModelError(f"{self.name}: holds no tensors; is it a state dict?")


Kind = tuple[str, bool, str]
Kinds = Callable[[str, tuple[int, ...]], Kind]


def guess_kind(name: str, shape: tuple[int, ...]) -> Kind:
    """(kind, transposed, group) of a tensor of a bare state dict: PyTorch calls layers' matrices `weight`.

    >>> guess_kind("fc.weight", (10, 64))[0], guess_kind("bn.weight", (64,))[0]
    ('linear', '')
    """
    if name.rpartition(".")[2] != "weight" or 0 in shape:
        return "", False, ""
    return {2: "linear", 3: "conv", 4: "conv"}.get(len(shape), ""), False, ""


def _require_plain(what: str, tensor: Tensor) -> None:
    """Refuse tensors that are no plain array of bytes in memory."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor.is_quantized:
        raise ModelError(f"{what}: is sparse, nested, quantised or without data; make it a plain dense tensor")
    if tensor.nbytes > max(1 << 30, tensor.untyped_storage().nbytes()):
        raise ModelError(f"{what}: is a view of {tensor.nbytes} bytes into far fewer; save it as a tensor of its own")


class StateDictSource:
    """Builds a source of tensors in memory; names of one storage are stored once."""

    @staticmethod
    def from_tensors(
        name: str,
        state: Mapping[str, object],
        kinds: Kinds | None = None,
        **rest: Any,
    ) -> Source:
        """The source of a state dict.

        Args:
            name: for messages.
            state: names to tensors.
            kinds: (kind, transposed, group) of a tensor; default by name and shape.
            rest: further fields of `Source`.
        """
        for key, value in state.items():
            if isinstance(value, Tensor):
                _require_plain(f"{name}: tensor {str(key)[:80]!r}", value)
        wrong = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
        if wrong:
            raise ModelError(f"{name}: entry {str(wrong[0])[:80]!r} is no named tensor; pass model.state_dict()")
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        shared = find_shared(tensors.items())
        infos = {}
        for key, value in tensors.items():
            if key in shared:
                continue
            dtype, shape = dtype_name(value.dtype), tuple(value.shape)
            infos[key] = SourceTensor(dtype, shape, *(kinds or guess_kind)(key, shape))
        return Source(name, infos, lambda key: tensors[key].detach().cpu().resolve_conj().resolve_neg(), shared, **rest)


def find_shared(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Names that view the same memory in the same way as an earlier name: {later: earlier}."""
    first: dict[tuple[object, ...], str] = {}
    shared = {}
    for name, tensor in tensors:
        if tensor.device.type == "meta" or not tensor.numel():
            continue
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if first.setdefault(view, name) != name:
            shared[name] = first[view]
    return shared
