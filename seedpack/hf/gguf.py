"""GGUF files, through transformers: dequantised, with the config and the tokenizer that the file carries."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import weakref
from pathlib import Path

from seedpack.converter.sources.base import Source, StateDictSource
from seedpack.errors import ModelError, first_line
from seedpack.hf.checkpoint_names import Skeleton


def open_gguf(path: Path) -> Source:
    """The source of a GGUF file. The whole model is dequantised to float32 in memory."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"{path}: reading GGUF needs {package}; pip install 'seedpack[gguf]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except Exception as error:  # the parser meets foreign bytes: whatever it raises, they are no model
        raise ModelError(f"{path}: transformers cannot read it ({first_line(error)})") from error
    holder = tempfile.TemporaryDirectory(prefix="seedpack-gguf-")
    folder = Path(holder.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    dropped = []
    try:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    except Exception:  # not every tokenizer can be converted; the weights can be packed all the same
        dropped.append("its tokenizer, which transformers cannot convert,")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    skeleton = Skeleton(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in skeleton.tied}
    files = sorted(file for file in folder.iterdir() if file.name != "config.json")
    source = StateDictSource.from_tensors(str(path), state, skeleton.kind, config=config, files=files, dropped=dropped)
    with torch.device("meta"):
        outline = Skeleton(type(model)(model.config))
    source.power = lambda name: outline.power(name, {key: key for key in state}, source.read)
    source.parameters = outline.parameters
    source.opened = lambda: (model, AutoTokenizer.from_pretrained(folder) if not dropped else None)
    weakref.finalize(source, holder.cleanup)
    return source
