"""Hugging Face folders: config.json says the architecture, the architecture says what each tensor is."""

from __future__ import annotations

import os
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedpack.converter.plan import SourceTensor
from seedpack.converter.sources.base import Source, StateDictSource
from seedpack.converter.sources.safetensors import open_safetensors
from seedpack.converter.sources.torch_file import load_state_dict
from seedpack.errors import ModelError, first_line
from seedpack.formats.reader import read_json
from seedpack.hf.checkpoint_names import Skeleton, architecture

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
        found = config["quantization_config"]
        method = found.get("quant_method", "?") if isinstance(found, dict) else found
        raise ModelError(f"{path}: is quantised already (by {method}); start from the dense model")
    skeleton = Skeleton.of_folder(path)
    rest: dict[str, Any] = {"config": config, "files": _further_files(path), "opened": lambda: open_model(path)}
    files = _weights(path, "model.safetensors")
    if files:
        return resolve_ties(open_safetensors(files, str(path), skeleton.kind, **rest), skeleton)
    files = _weights(path, "pytorch_model.bin")
    if not files:
        raise ModelError(f"{path}: holds neither model.safetensors nor pytorch_model.bin, nor an index of shards")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_state_dict(file)[0]
    source = StateDictSource.from_tensors(str(path), state, skeleton.kind, **rest)
    source.shared.clear()  # transformers ties by its config
    return resolve_ties(source, skeleton)


def resolve_ties(source: Source, skeleton: Skeleton) -> Source:
    """Keep one tensor for each set of tied ones, under the name that transformers reads it from."""
    stored = {skeleton.parameter(name)[0]: name for name in source.tensors}
    read = source.read
    renamed: dict[str, str] = {}
    for target, origin in skeleton.tied.items():
        if target not in stored:
            continue
        name = stored[target]
        if origin not in stored:
            info = source.tensors[name]
            source.tensors[origin] = SourceTensor(info.dtype, info.shape, *skeleton.kind(origin, info.shape))
            renamed[origin] = stored[origin] = name
        elif not torch.equal(read(stored[origin]), read(name)):
            raise ModelError(
                f"{source.name}: the config ties {name!r} to {stored[origin]!r}, but their values differ; "
                'set "tie_word_embeddings": false in config.json'
            )
        del source.tensors[name]
    source.read = lambda name: read(renamed.get(name, name))
    source.power = lambda name: skeleton.power(name, stored, source.read)
    source.parameters = skeleton.parameters
    return source


def _free_bytes() -> int:
    """Memory that could be had, as the system says; where it does not, as much as one could wish."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62


def open_model(path: Path) -> tuple[Any, Any]:
    """A folder's model, in float32, and its tokenizer or None; on disk where it fills more than half of what is free."""
    import transformers

    config = read_json(path / "config.json")
    cls = architecture(config) or transformers.AutoModel
    files = list(path.glob("*.safetensors")) or list(path.glob("*.bin"))
    size = sum(file.stat().st_size for file in files)
    options: dict[str, Any] = {"dtype": torch.float32}
    holder = None
    if 2 * size > _free_bytes() / 2:
        holder = tempfile.TemporaryDirectory(prefix="seedpack-")
        options = {"dtype": "auto", "device_map": {"": "disk"}, "offload_folder": holder.name}
    try:
        model = cls.from_pretrained(path, **options)
    except Exception as error:  # the libraries' own
        raise ModelError(f"{path}: transformers cannot run it ({first_line(error)})") from error
    if holder is not None:
        weakref.finalize(model, holder.cleanup)
    try:
        return model, transformers.AutoTokenizer.from_pretrained(path)
    except Exception:  # not every model has one
        return model, None


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
        if Path(name).name != name or len(name) > 255 or not (path / name).is_file():
            raise ModelError(f"{index}: names the shard {name[:120]!r}, which is not in the folder")
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
