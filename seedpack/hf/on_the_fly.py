"""Dense checkpoint -> packed one, while transformers loads it: in a folder of its own, whose files are loaded in its place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from seedpack.converter.pipeline import compress
from seedpack.converter.trust import trusting_remote_code
from seedpack.errors import ModelError
from seedpack.formats import Checkpoint
from seedpack.hf.config import SeedpackConfig


def pack_on_the_fly(
    config: SeedpackConfig, model: Any, *, checkpoint_files: list[str] | None, device_map: Any = None, **_: Any
) -> Path:
    """Pack the folder that a model is to be loaded from, and have the packed files read instead.

    Args:
        config: how to pack; it becomes that of the packed model.
        model: of transformers, without data.
        checkpoint_files: that transformers is going to read; replaced.
        device_map: of the model: where it has a GPU, tensors are fitted there.

    Returns:
        The folder of the packed files, which can be removed once they are loaded.

    Raises:
        ModelError: the model is not read from files of a folder.
    """
    options = config.options
    if options is None or not checkpoint_files:
        raise ModelError(
            "SeedpackConfig(…) packs the files of a folder or hub model; pack others with seedpack.compress"
        )
    if options.device == "cpu" and (gpu := _gpu(device_map)) is not None:
        options = replace(options, device=gpu)
    holder = Path(tempfile.mkdtemp(prefix="seedpack-packed-"))
    try:
        with trusting_remote_code(type(model).__module__.startswith("transformers_modules.")):
            compress(Path(checkpoint_files[0]).parent, holder / "packed", options, progress=_shows_progress())
        packed = sorted((holder / "packed").glob("*.safetensors"))
        with Checkpoint(holder / "packed") as checkpoint:
            config.manifest, config.options = checkpoint.manifest.packed_only(), None
    except BaseException:
        shutil.rmtree(holder)
        raise
    checkpoint_files[:] = map(str, packed)
    return holder


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
