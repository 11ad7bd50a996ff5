"""State dicts in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from seedpack.converter.sources.base import NO_FILES, FileState, KindOf, Source, SourceTensor
from seedpack.converter.sources.kinds import guess_kind
from seedpack.dtypes import dtype_name, find_shared
from seedpack.errors import ModelError


class StateDictSource(Source):
    """Tensors in memory; names of one storage are stored once.

    Args:
        name: for messages.
        state: names to tensors.
        kind_of: how a tensor is packed; default by its name and shape.
        dropped: what the input held beside tensors.
        files: that the tensors are mapped from.
    """

    def __init__(
        self,
        name: str,
        state: Mapping[str, object],
        kind_of: KindOf | None = None,
        *,
        dropped: Iterable[str] = (),
        files: Mapping[Path, FileState] = NO_FILES,
    ):
        for key, value in state.items():
            if isinstance(value, Tensor):
                _require_plain(f"{name}: tensor {str(key)[:80]!r}", value)
        wrong = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
        if wrong:
            raise ModelError(f"{name}: entry {str(wrong[0])[:80]!r} is not a named tensor; pass model.state_dict()")
        self._state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        shared = find_shared(self._state.items())
        tensors = {}
        for key, value in self._state.items():
            if key not in shared:
                dtype, shape = dtype_name(value.dtype), tuple(value.shape)
                tensors[key] = SourceTensor(dtype, shape, *(kind_of or guess_kind)(key, shape))
        super().__init__(name, tensors, shared=shared, dropped=dropped, files=files)

    def _read(self, name: str) -> Tensor:
        """Return one tensor on the CPU."""
        return self._state[name].detach().cpu().resolve_conj().resolve_neg()


def _require_plain(label: str, tensor: Tensor) -> None:
    """Refuse tensors that are no plain array of bytes in memory."""
    if tensor.is_meta:
        raise ModelError(
            f"{label}: is without data (on the meta device, or offloaded); load the model whole, or pack its folder"
        )
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        raise ModelError(f"{label}: is sparse, nested or quantised; make it a plain dense tensor")
    if tensor.nbytes > max(1 << 30, tensor.untyped_storage().nbytes()):
        raise ModelError(f"{label}: is a view of {tensor.nbytes} bytes into far fewer; save it as a tensor of its own")
