"""List the tensors of files that are not in safetensors: state dicts of torch, and GGUF."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from seedpack.errors import ModelError, first_line
from seedpack.formats.listing import Listing, StoredTensor


def list_torch(paths: list[Path]) -> Listing:
    """List the state dicts of some files, the shards of one checkpoint."""
    from seedpack.converter.sources.state_dict import StateDictSource
    from seedpack.converter.sources.torch_file import load_state_dict

    sources = [StateDictSource(str(path), load_state_dict(path)[0]) for path in paths]
    tensors = [
        StoredTensor(name, tensor.shape, tensor.dtype, tensor.source_bytes)
        for source in sources
        for name, tensor in source.tensors.items()
    ]
    return Listing(tensors, paths, {alias: name for source in sources for alias, name in source.shared.items()})


def list_gguf(path: Path) -> Listing:
    """List the tensors of a GGUF file, with the shapes that they have in torch."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{path}: reading GGUF needs gguf; pip install gguf")
    from gguf import GGUFReader

    try:
        tensors = [
            StoredTensor(t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name, int(t.n_bytes))
            for t in GGUFReader(path).tensors
        ]
    except Exception as error:  # the parser meets foreign bytes: whatever it raises, they are no model
        raise ModelError(f"{path}: not a GGUF file that can be read ({first_line(error)})") from error
    return Listing(tensors, [path])
