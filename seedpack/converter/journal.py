"""Tensors that are fitted are kept beside the output until it stands, so that an interrupted run goes on where it stopped.

An entry is named by all that its bytes follow from: the tensor's own, the codec with its settings, the statistics that it is
fitted with, the device's kind. So a run of other choices takes what is the same, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from seedpack._version import __version__
from seedpack.codecs.importance import Importance
from seedpack.codecs.registry import codec_to_json
from seedpack.converter.plan import Plan, TensorPlan
from seedpack.converter.report import TensorReport
from seedpack.dtypes import to_bytes
from seedpack.errors import OutputError
from seedpack.formats.digest import part_digest

NUMBERS = ("error", "energy", "seconds", "output_error", "output_energy")  # of a report


class Journal:
    """A folder of fitted tensors, which `formats.staging` removes once the output stands.

    Args:
        folder: made with the first entry.
        kind: of the device that fits, and the backend: they may round in their own ways.
    """

    def __init__(self, folder: Path, kind: str):
        self.folder, self._kind = folder, kind
        self._found = set(folder.glob("*.safetensors"))  # by runs before

    def key(self, tensor: TensorPlan, value: Tensor, importance: Importance) -> str:
        """Return the name of an entry.

        Args:
            tensor: how it is packed.
            value: the tensor as the source has it.
            importance: that it is fitted with.
        """
        how = [
            __version__,
            self._kind,
            codec_to_json(tensor.codec),
            list(tensor.shape),
            tensor.transposed,
            tensor.dtype,
        ]
        digest = hashlib.sha256(json.dumps(how).encode())
        digest.update(part_digest(*to_bytes(value)).encode())
        if importance.values is not None:
            digest.update(part_digest(*to_bytes(importance.values)).encode())
        return digest.hexdigest()[:32]

    def get(self, key: str, tensor: TensorPlan) -> tuple[dict[str, Tensor], TensorReport] | None:
        """Return the parts and the report of an entry, if it is there and whole."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                kept = file.metadata()
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if kept["digest"] != tensors_digest(parts):
                return None
            tensor.codec.check(parts, tensor.codec_shape)
            return parts, TensorReport(tensor, **{name: float(kept[name]) for name in NUMBERS})
        except Exception:  # half of a file, or another's: it is fitted again
            return None

    def put(self, key: str, parts: Mapping[str, Tensor], report: TensorReport) -> None:
        """Keep a tensor's parts.

        Raises:
            OutputError: the disk is full, or cannot be written.
        """
        kept = {name: part.cpu().contiguous() for name, part in parts.items()}
        plan, numbers = report.plan, {name: repr(getattr(report, name)) for name in NUMBERS}
        notes = {**numbers, "tensor": plan.name, "codec": codec_to_json(plan.codec), "digest": tensors_digest(kept)}
        write_file(self._path(key), lambda partial: save_file(kept, partial, notes))

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.safetensors")))

    def done_before(self, plan: Plan) -> int:
        """Return how many packed tensors of a plan had an entry of their name and codec before this run, which is theirs unless the
        source or the statistics are others now."""
        wanted = {(tensor.name, codec_to_json(tensor.codec)) for tensor in plan.tensors if tensor.packed}
        found = set()
        for path in self._found:
            with suppress(Exception), safe_open(path, "pt") as file:  # the library's own errors differ by version
                found.add((file.metadata()["tensor"], file.metadata()["codec"]))
        return len(wanted & found)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of some tensors with their names."""
    digests = {name: part_digest(*to_bytes(tensor)) for name, tensor in sorted(tensors.items())}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside a file, and put it in its place when it is whole and on the disk."""
    partial = path.parent / f".{path.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        descriptor = os.open(partial, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"{path.parent}: cannot be written: {error.strerror or error}; free space, and run the same command again: it goes on "
            "from there"
        ) from error
