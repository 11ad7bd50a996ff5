"""The interface of every source of weights."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedpack.dtypes import to_bytes
from seedpack.errors import ModelError
from seedpack.formats import Manifest
from seedpack.formats.digest import part_digest


@dataclass(frozen=True)
class SourceTensor:
    """A tensor as a source has it.

    Attributes:
        dtype: its safetensors name.
        shape: as stored.
        kind: what a model uses it for: linear, embedding, head (the output head, or an embedding tied to it), conv,
            expert, or "" (raw).
        transposed: stored [in, out].
        group: for experts, the parameter that all of the group become parts of in memory.
    """

    dtype: str
    shape: tuple[int, ...]
    kind: str = ""
    transposed: bool = False
    group: str = ""


Kind = tuple[str, bool, str]  # kind, transposed, group of a SourceTensor
KindOf = Callable[[str, tuple[int, ...]], Kind]  # of a tensor's name and shape


@dataclass(frozen=True)
class OpenModel:
    """A model that can run.

    Attributes:
        module: in float32, or partly on disk.
        tokenizer: where the model has one.
        layer_names: of a causal language model, the names of its decoder layers; empty for anything else.
        generate: of a causal language model, (module, tokens, context, seed, progress) -> int64 [n, context], text that
            the model samples itself; progress is called with the tokens written since the last call.
    """

    module: Any
    tokenizer: Any = None
    layer_names: tuple[str, ...] = ()
    generate: Callable[[Any, int, int, int, Callable[[int], None]], Tensor] | None = None


class Source(ABC):
    """A model's tensors, read one at a time.

    Attributes:
        name: where they come from, for messages.
        tensors: in file order.
        shared: further names of some tensors.
        config: of a Hugging Face model, whose output is a folder; None for anything else.
        dropped: what the input held beside tensors, for a note.
    """

    def __init__(
        self,
        name: str,
        tensors: dict[str, SourceTensor],
        *,
        shared: dict[str, str] | None = None,
        config: dict[str, Any] | None = None,
        dropped: Iterable[str] = (),
    ):
        if not tensors:
            raise ModelError(f"{name}: holds no tensors; is it a state dict?")
        self.name, self.tensors, self.shared, self.config = name, tensors, shared or {}, config
        self.dropped = list(dropped)

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU; nothing of it stays in memory here."""

    def norm_power(self, name: str) -> Tensor | None:
        """Return the power of each input channel of a weight's layer [in], where a norm before it tells."""
        return None

    def parameters(self, name: str) -> list[str]:
        """Return the model's names of a tensor: that of its parameter first, then those tied to it."""
        return [name]

    def open_model(self) -> OpenModel:
        """Open the model to run it.

        Raises:
            ModelError: there is none to run.
        """
        raise ModelError(
            f"{self.name}: calibration runs the model, and a bare state dict has none to run; pass a Hugging Face folder, "
            "or from Python the module itself and batches"
        )

    def complete_output(self, folder: Path, manifest: Manifest, dtype: torch.dtype | None) -> None:
        """Write what a folder needs beside the packed weights; only a source with a `config` makes a folder.

        Args:
            folder: the output, not yet in its place.
            manifest: of the packed weights.
            dtype: that the model is to be loaded in, if it was asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} has no config, so its output is a file")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all tensors and the config."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode())
        for name in self.tensors:
            digest.update(name.encode())
            digest.update(part_digest(*to_bytes(self.read(name))).encode())
        return digest.hexdigest()
