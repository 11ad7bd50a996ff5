"""File -> dense file: every tensor rebuilt, one in memory at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from seedpack._version import WRITER
from seedpack.dtypes import to_bytes
from seedpack.formats import Checkpoint, CheckpointWriter
from seedpack.formats.header import nbytes
from seedpack.loader.dense import dense_forms, dense_tensors, require_decodable
from seedpack.loader.limits import require_affordable
from seedpack.loader.save import raw_planned


def write_dense(checkpoint: Checkpoint, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a plain safetensors file with every tensor of a checkpoint, in its own dtype or, of floats, in another.

    Raises:
        LimitError: a tensor takes too much decoded, or the file on disk.
    """
    require_decodable(checkpoint, checkpoint.manifest.tensors)
    forms = dense_forms(checkpoint, dtype)
    size = sum(nbytes(kind, shape) for _, kind, shape in forms)
    require_affordable(checkpoint, "the dense file", size, in_memory=False)
    planned = [raw_planned(name, kind, shape) for name, kind, shape in forms]
    with CheckpointWriter(path, planned, {}, WRITER, manifest=False) as writer:
        for name, tensor in dense_tensors(checkpoint, dtype):
            writer.write(name, {"weight": to_bytes(tensor)})
