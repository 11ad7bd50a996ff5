"""transformers models that `seedpack.load(file, model=model)` has filled: they save as those that transformers loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from seedpack.formats import Manifest
from seedpack.formats.manifest import part_key
from seedpack.hf.internals import attach_quantizer, replace_ties, tied_parameters
from seedpack.loader.parameters import memory_names, packed_leaves
from seedpack.loader.trained import joined


def attach_manifest_(model: nn.Module, manifest: Manifest, stored: Mapping[str, str]) -> None:
    """Give each transformers model in a filled module the quantiser that loading a packed folder would have given it.

    Args:
        model: the module.
        manifest: of the checkpoint that filled it.
        stored: {name in the module: name in the checkpoint}.
    """
    for prefix, pretrained in _pretrained_models(model):
        parts = {
            joined(path, leaf): {part: joined(path, held) for part, held in memory_names(module, leaf).items()}
            for path, module in pretrained.named_modules()
            for leaf in packed_leaves(module)
        }
        if parts and getattr(pretrained, "hf_quantizer", None) is None:
            _attach(pretrained, parts, {name: stored[joined(prefix, name)] for name in parts}, manifest)


def _attach(model: Any, parts: dict[str, dict[str, str]], stored: Mapping[str, str], manifest: Manifest) -> None:
    """Attach the quantiser.

    Args:
        model: of transformers.
        parts: names of the parts in memory, by packed parameter and part.
        stored: names of the parameters in the checkpoint.
        manifest: of the checkpoint.
    """
    from seedpack.hf.config import SeedpackConfig
    from seedpack.hf.quantizer import SeedpackQuantizer, run_experts_one_at_a_time, tie_parts

    ties = {name: source for name, source in tied_parameters(model).items() if name in parts and source in parts}
    if any(stored[name] != stored[source] for name, source in ties.items()):
        replace_ties(model, ties, {})
        ties, model.config.tie_word_embeddings = {}, False
    own = {name: stored[name] for name in parts if name not in ties}
    packed = manifest.select(own.values())
    packed = replace(packed, tensors={name: packed.tensors[of] for name, of in own.items()}, shared={}, views={})
    run_experts_one_at_a_time(model)
    tie_parts(model, {name.rpartition(".")[0] for name in own})
    on_disk = {part_key(name, part): held for name in own for part, held in parts[name].items()}
    attach_quantizer(model, SeedpackQuantizer(SeedpackConfig.of(packed)), on_disk)


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
