"""transformers models that `seedpack.load(file, model=model)` has filled: they save as those that transformers loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from seedpack.formats import Manifest
from seedpack.hf.internals import attach_quantizer, tied_parameters
from seedpack.loader.layers import PRINCIPAL, PackedModule, memory_name
from seedpack.loader.trained import joined


def attach_manifest_(model: nn.Module, manifest: Manifest, stored: Mapping[str, str]) -> None:
    """Give each transformers model in a filled module the quantiser that loading a packed folder would have given it.

    Args:
        model: the module.
        manifest: of the checkpoint that filled it.
        stored: {name in the module: name in the checkpoint}.
    """
    for prefix, pretrained in _pretrained_models(model):
        layers = {name: layer for name, layer in pretrained.named_modules() if isinstance(layer, PackedModule)}
        if layers and getattr(pretrained, "hf_quantizer", None) is None:
            own = {name: stored[joined(prefix, f"{name}.weight")] for name in layers}
            _attach(pretrained, layers, own, manifest)


def _attach(model: Any, layers: Mapping[str, PackedModule], stored: Mapping[str, str], manifest: Manifest) -> None:
    from seedpack.hf.config import SeedpackConfig
    from seedpack.hf.quantizer import SeedpackQuantizer, tie_parts

    heads = {
        name.removesuffix(".weight"): source.removesuffix(".weight") for name, source in tied_parameters(model).items()
    }
    tied = {name for name, source in heads.items() if name in layers and source in layers}
    if any(not _same_parts(layers[name], layers[heads[name]]) for name in tied):
        tied, model.config.tie_word_embeddings, model.all_tied_weights_keys = set(), False, {}
    names = {f"{name}.weight": stored[name] for name in layers if name not in tied}
    packed = manifest.select(names.values())
    packed = replace(packed, tensors={name: packed.tensors[of] for name, of in names.items()}, shared={}, views={})
    tie_parts(model, layers.keys() - tied)
    on_disk = {
        joined(name, part): joined(name, memory_name(part))
        for name, layer in layers.items()
        for part in layer.part_names
        if name not in tied
    }
    attach_quantizer(model, SeedpackQuantizer(SeedpackConfig(**packed.to_json())), on_disk)


def _same_parts(a: PackedModule, b: PackedModule) -> bool:
    return a._parameters[PRINCIPAL] is b._parameters[PRINCIPAL]


def _pretrained_models(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the transformers models in a module that are in no other, by name; transformers is not imported for that."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return
    if isinstance(module, modeling.PreTrainedModel):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _pretrained_models(child, joined(prefix, name))
