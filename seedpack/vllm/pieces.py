"""The rows of a packed weight that one rank of vLLM holds.

A layer of vLLM may be made of several tensors of a checkpoint (q, k and v; gate and up; the matrices of experts). Each of them
stays a weight of its own here, with its own codec and bits. A rank holds some of its output rows and all of its inputs, whatever
the kind of parallelism: a stream cannot be cut between its inputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from seedpack.codecs.base import Codec
from seedpack.codecs.registry import codec_from_spec
from seedpack.dtypes import TORCH_DTYPES, to_bytes
from seedpack.errors import DigestError, ModelError
from seedpack.formats import Manifest
from seedpack.formats.digest import part_digest, verifies
from seedpack.formats.manifest import PRINCIPAL_PART
from seedpack.loader.layers import PackedLinear, pack_module_


def rounds_activations() -> bool:
    """Return whether few tokens on a CPU are rounded to 8 bits, as in transformers: where SEEDPACK_INT8_ACTIVATIONS is 1.

    By default they are not: a request would get another text beside others than alone.
    """
    return os.environ.get("SEEDPACK_INT8_ACTIVATIONS") == "1"


def require_digest(name: str, part: str, value: Tensor, digests: Mapping[str, str]) -> None:
    """Refuse a part of a tensor whose bytes are not those that were written, unless SEEDPACK_VERIFY is 0."""
    if part in digests and verifies() and part_digest(*to_bytes(value)) != digests[part]:
        raise DigestError(f"{name}: part {part!r} is damaged: its digest differs; copy the file again")


class Piece:
    """A tensor of the checkpoint, of which a rank holds some rows; it is filled part by part.

    Args:
        manifest: of the packed tensors.
        name: in the checkpoint; one that the manifest does not have is stored raw.
        shape: that the layer expects, [out, in].
        rows: that this rank holds, int64 [n].
        dtype: of the weights and of what they are multiplied with.
    """

    def __init__(self, manifest: Manifest, name: str, shape: tuple[int, int], rows: Tensor, dtype: torch.dtype):
        self.name, self.shape, self.rows, self.dtype = name, shape, rows, dtype
        self.codec: Codec | None = None
        self._digests: dict[str, str] = {}
        self._parts: dict[str, Tensor] = {}
        self._filled: RowsOfWeight | None = None
        self._expected = {PRINCIPAL_PART}
        if name not in manifest.tensors:
            return
        entry = manifest.tensors[name]
        self.codec, self._digests = codec_from_spec(manifest.codec_of(name)), entry.parts
        self._expected = set(entry.parts)
        if entry.shape != shape:
            raise ModelError(
                f"{name}: is packed as {list(entry.shape)}, and vLLM's layer takes {list(shape)}; serve the model with "
                f"transformers, or pack it with --exclude {name}"
            )

    @property
    def specs(self) -> dict[str, torch.dtype]:
        """The dtypes of the parts, by name."""
        if self.codec is None:
            return {PRINCIPAL_PART: self.dtype}
        return {part: TORCH_DTYPES[dtype] for part, (dtype, _) in self.codec.parts(self.shape).items()}

    def take(self, part: str, value: Tensor, device: torch.device) -> None:
        """Take a part as the file has it; with the last one, this rank's rows go to the device.

        Raises:
            DigestError: its bytes are not those that were written.
        """
        require_digest(self.name, part, value, self._digests)
        self._parts[part] = value
        if self._parts.keys() == self._expected:
            self._filled = self._fill(device)
            self._parts = {}

    def _fill(self, device: torch.device) -> RowsOfWeight:
        parts, whole = self._parts, len(self.rows) == self.shape[0]
        if self.codec is None:
            value = parts[PRINCIPAL_PART]
            if tuple(value.shape) != self.shape:
                raise ModelError(
                    f"{self.name}: has shape {list(value.shape)}, and vLLM's layer takes {list(self.shape)}"
                )
            linear = nn.Linear(self.shape[1], len(self.rows), bias=False, device="meta")
            linear.weight = nn.Parameter(value[self.rows].to(device, self.dtype), requires_grad=False)
            return RowsOfWeight(linear, None)
        self.codec.check(parts, self.shape)
        cuts = not whole and type(self.codec).rows is not Codec.rows
        held = self.codec.rows(parts, self.rows) if cuts else parts
        count = len(self.rows) if cuts else self.shape[0]
        linear = nn.Linear(self.shape[1], count, bias=False, device="meta", dtype=self.dtype)
        held = {name: value.to(device) for name, value in held.items()}
        packed = pack_module_(linear, self.codec, held, dtype=self.dtype, some_rows=cuts)
        packed.int8_activations = None if rounds_activations() else False
        return RowsOfWeight(cast(nn.Linear, packed), None if whole or cuts else self.rows.to(device))

    def filled(self) -> RowsOfWeight:
        """Return the weight.

        Raises:
            ModelError: the checkpoint lacks a part.
        """
        if self._filled is None:
            missing = sorted(self._expected - self._parts.keys())
            raise ModelError(
                f"{self.name}: the checkpoint lacks {', '.join(missing)}; copy it again, or compress the model again"
            )
        return self._filled


class RowsOfWeight(nn.Module):
    """The product with some rows of a weight.

    Args:
        linear: packed or dense, without a bias.
        chosen: of its rows, where its codec cannot hold some alone.
    """

    chosen: Tensor | None

    def __init__(self, linear: nn.Linear, chosen: Tensor | None):
        super().__init__()
        self.linear = linear
        self.register_buffer("chosen", chosen, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., rows]."""
        y: Tensor = self.linear(x)
        return y if self.chosen is None else y.index_select(-1, self.chosen)

    def lookup(self, index: Tensor) -> Tensor:
        """Return the rows [..., in] that an index [...] names."""
        if self.chosen is not None:
            index = self.chosen[index]
        if isinstance(self.linear, PackedLinear):
            return self.linear.rows(index)
        return nn.functional.embedding(index, self.linear.weight)


def register_parts(layer: nn.Module, pieces: list[Piece], prefix: str, load: Callable[..., Any]) -> None:
    """Register empty parameters by which vLLM finds where the parts go.

    Args:
        layer: to register them in.
        pieces: whose parts they are.
        prefix: of their names.
        load: (part, value, *rest) is called with each part.
    """
    specs = {part: dtype for piece in pieces for part, dtype in piece.specs.items()}
    for part, dtype in specs.items():

        def loader(param: Any, loaded_weight: Tensor, *rest: Any, part: str = part, **named: Any) -> Any:
            return load(part, loaded_weight, *rest, **named)

        parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        parameter.weight_loader = loader  # type: ignore[attr-defined]
        layer.register_parameter(f"{prefix}{part}", parameter)


def rows_of(pieces: list[Piece]) -> nn.ModuleList:
    """Return the weights of pieces that are loaded."""
    return nn.ModuleList(piece.filled() for piece in pieces)


def take_over(layer: Any) -> None:
    """Have a layer compute with the weights of its pieces, which are loaded."""
    if hasattr(layer, "unfilled"):
        layer.pieces = rows_of(layer.unfilled)
        del layer.unfilled
