"""Hugging Face folders: config.json says the architecture, the architecture says what each tensor is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from seedpack.errors import ModelError
from seedpack.formats.reader import read_json
from seedpack.model.skeleton import Skeleton
from seedpack.model.sources.base import Source, StateDictSource
from seedpack.model.sources.safetensors import open_safetensors
from seedpack.model.sources.torch_file import load_state_dict

WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".th",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".npz",
}


def open_folder(path: Path) -> Source:
    """The source of a folder with config.json and weights, sharded or not."""
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{path}: has no config.json; pass the weight file itself, or a Hugging Face folder")
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise ModelError(f"{config_file}: expected a JSON object")
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "?")
        raise ModelError(f"{path}: is quantised already (by {method}); start from the dense model")
    skeleton = Skeleton.of_folder(path)
    rest: dict[str, Any] = {"config": config, "files": _further_files(path)}
    files = _weights(path, "model.safetensors")
    if files:
        return open_safetensors(files, str(path), skeleton.kind, skeleton.tied, **rest)
    files = _weights(path, "pytorch_model.bin")
    if not files:
        raise ModelError(f"{path}: holds neither model.safetensors nor pytorch_model.bin, nor an index of shards")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_state_dict(file)[0]
    kept = {name: tensor for name, tensor in state.items() if name not in skeleton.tied}
    return StateDictSource.from_tensors(str(path), kept, lambda name, t: skeleton.kind(name, tuple(t.shape)), **rest)


def _weights(path: Path, single: str) -> list[Path]:
    index = path / f"{single}.index.json"
    if not index.is_file():
        return [path / single] if (path / single).is_file() else []
    document = read_json(index)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise ModelError(f"{index}: names the shard {name!r}, which is not in the folder")
    return [path / name for name in names]


def _further_files(path: Path) -> list[Path]:
    """Files beside the weights that a packed folder should keep."""
    return sorted(
        file
        for file in path.iterdir()
        if file.is_file()
        and file.suffix.lower() not in WEIGHT_SUFFIXES
        and file.name != "config.json"
        and not file.name.endswith(".index.json")
        and not file.name.startswith(".")
    )
