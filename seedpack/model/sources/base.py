"""What every source offers, and the source of tensors that are in memory already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from seedpack.dtypes import dtype_name
from seedpack.errors import ModelError
from seedpack.model.plan import SourceTensor


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
    """

    name: str
    tensors: dict[str, SourceTensor]
    read: Callable[[str], Tensor]
    shared: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    files: list[Path] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ModelError(f"{self.name}: holds no tensors; is it a state dict?")


def guess_kind(name: str, dtype: str, shape: tuple[int, ...]) -> str:
    """What a tensor of a bare state dict is, by its name and shape: PyTorch calls layers' matrices `weight`.

    >>> guess_kind("fc.weight", "F32", (10, 64)), guess_kind("bn.weight", "F32", (64,))
    ('linear', '')
    """
    if name.rpartition(".")[2] != "weight" or 0 in shape:
        return ""
    return {2: "linear", 3: "conv", 4: "conv"}.get(len(shape), "")


class StateDictSource:
    """Builds a source of tensors in memory; names of one storage are stored once."""

    @staticmethod
    def from_tensors(
        name: str,
        state: Mapping[str, object],
        kinds: Callable[[str, Tensor], tuple[str, bool]] | None = None,
        **rest: Any,
    ) -> Source:
        """The source of a state dict.

        Args:
            name: for messages.
            state: names to tensors.
            kinds: (kind, transposed) of a tensor; default by name and shape.
            rest: further fields of `Source`.
        """
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
            kind, transposed = kinds(key, value) if kinds else (guess_kind(key, dtype, shape), False)
            infos[key] = SourceTensor(dtype, shape, kind, transposed)
        return Source(name, infos, lambda key: tensors[key].detach().to("cpu"), shared, **rest)


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
