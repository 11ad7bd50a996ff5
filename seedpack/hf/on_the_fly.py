"""Dense checkpoint -> packed one, while transformers loads it: in a folder of its own, whose files are loaded in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from seedpack.converter.pipeline import compress
from seedpack.converter.trust import trusting_remote_code
from seedpack.errors import ModelError
from seedpack.formats import Checkpoint
from seedpack.hf.checkpoint_names import CheckpointNames
from seedpack.hf.config import SeedpackConfig
from seedpack.hf.folder import FolderSource


def pack_on_the_fly(
    config: SeedpackConfig,
    packed: Path,
    model: Any,
    *,
    checkpoint_files: list[str] | None,
    device_map: Any = None,
    **_: Any,
) -> None:
    """Pack the files that a model is to be loaded from, and have the packed ones read instead.

    Args:
        config: how to pack; it becomes that of the packed model.
        packed: the folder to be made.
        model: of transformers, without data.
        checkpoint_files: that transformers is going to read; replaced.
        device_map: of the model: where it has a GPU, tensors are fitted there.

    Raises:
        ModelError: the model is not read from files of a folder, or is to stay on the disk.
    """
    options = config.options
    if options is None or not checkpoint_files:
        raise ModelError(
            "SeedpackConfig(…) packs the files of a folder or hub model; pack others with seedpack.compress"
        )
    if isinstance(device_map, Mapping) and "disk" in device_map.values():
        raise stays_on_disk()
    if options.device == "cpu" and (gpu := _gpu(device_map)) is not None:
        options = replace(options, device=gpu)
    files = [Path(file) for file in checkpoint_files]
    with trusting_remote_code(type(model).__module__.startswith("transformers_modules.")):
        with torch.device("meta"):
            names = CheckpointNames(type(model)(model.config))
        compress(FolderSource(files[0].parent, files, names), packed, options, progress=_shows_progress())
    with Checkpoint(packed) as checkpoint:
        config.manifest, config.options = checkpoint.manifest.packed_only(), None
    checkpoint_files[:] = sorted(map(str, packed.glob("*.safetensors")))


def stays_on_disk() -> ModelError:
    """Return the error for a model whose packed files would have to stay."""
    return ModelError(
        "a model that is packed while it is loaded cannot stay on the disk; pack it first (seedpack compress)"
    )


def _gpu(device_map: Any) -> torch.device | None:
    """Return the first GPU of a device map, or of those that transformers is to spread the model over."""
    places = sorted(map(str, device_map.values() if isinstance(device_map, Mapping) else [device_map]))
    if {"auto", "balanced", "balanced_low_0", "sequential"} & set(places) and torch.cuda.is_available():
        return torch.device("cuda", 0)
    gpus = (place.removeprefix("cuda:") for place in places if place.isdecimal() or place.startswith("cuda"))
    return next((torch.device("cuda", int(gpu) if gpu.isdecimal() else 0) for gpu in gpus), None)


def _shows_progress() -> bool:
    from transformers.utils import logging

    return logging.is_progress_bar_enabled()
