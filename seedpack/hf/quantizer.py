"""Load and save packed models through transformers.

Before the weights are read the modules of the empty model are packed in place (their parts on the meta device), so that
transformers loads the parts like any other parameters.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from seedpack.codecs.registry import codec_from_spec
from seedpack.errors import CodecError, ModelError
from seedpack.formats import Manifest
from seedpack.formats.manifest import part_key
from seedpack.formats.verify import check_files
from seedpack.hf.checkpoint_names import CheckpointNames, architecture
from seedpack.hf.config import SeedpackConfig
from seedpack.hf.experts import ExpertGroup, pack_experts_
from seedpack.hf.internals import (
    OutsideOfLoading,
    is_converter,
    mark_initialised,
    needed,
    replace_ties,
    stacking_converter,
    tied_parameters,
    unfilled_tensors,
    with_whole_names,
)
from seedpack.hf.on_the_fly import pack_on_the_fly, stays_on_disk
from seedpack.loader.holder import NO_VALUES, PartHolder
from seedpack.loader.layers import PRINCIPAL, PackedModule, is_transposed, memory_name, pack_module_, packed_class
from seedpack.loader.parameters import PackedParameters, can_pack, check_, memory_names, pack_, unpack_
from seedpack.loader.trained import joined
from seedpack.loader.weight import PackedWeight

mark_initialised(PackedWeight)  # which transformers finds in the place of weights


class SeedpackQuantizer(HfQuantizer):
    """The quantiser that transformers calls; one for each `from_pretrained`."""

    requires_calibration = False  # a dense model is packed on the fly
    quantization_config: SeedpackConfig

    def __init__(self, quantization_config: SeedpackConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._expert_groups: list[ExpertGroup] = []
        self._layers: set[str] = set()  # paths of packed layers
        self._on_disk: dict[str, str] = {}  # names of parts in memory, by those in the checkpoint
        self._converters: set[str] = set()  # the patterns of those conversions that the checkpoint needs
        self._uncovered: set[str] = set()  # names of the model's tensors that the files have nothing for
        self._wait_for_digests: Callable[[], None] | None = None  # of files that are being read
        self._outside = OutsideOfLoading()
        self._remove_packed: Callable[[], object] | None = None  # what was packed on the fly

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.quantization_config.options is not None:
            packed = tempfile.mkdtemp(prefix="seedpack-packed-")
            self._remove_packed = weakref.finalize(self, shutil.rmtree, packed, ignore_errors=True)
            with self._outside():
                pack_on_the_fly(self.quantization_config, Path(packed) / "packed", model, **kwargs)
        manifest, dtype = self.quantization_config.manifest, model.config.dtype
        checkpoint_names = CheckpointNames(model)
        keys, self._wait_for_digests = check_files([Path(file) for file in kwargs["checkpoint_files"]], manifest)
        parts = {key for name in manifest.tensors for key in manifest.part_keys(name).values()}
        checkpoint_names = checkpoint_names.restricted([*manifest.tensors, *(keys - parts)])
        self._converters = checkpoint_names.converters
        manifest = self.quantization_config.manifest = _known_tensors(manifest, checkpoint_names)
        _require_parts(manifest, keys, checkpoint_names)
        self._uncovered = needed(model, checkpoint_names.uncovered(keys))
        experts: dict[str, list[str]] = defaultdict(list)
        for name in manifest.tensors:
            expert = checkpoint_names.expert(name)
            if expert is not None:
                experts[expert.module].append(name)
            else:
                self._pack(model, name, checkpoint_names.parameter(name)[0], dtype)
        self._expert_groups = [
            group
            for path, names in experts.items()
            for group in pack_experts_(model, path, names, checkpoint_names, manifest, dtype)
        ]
        _require_all_layers(model, self._expert_groups)
        run_experts_one_at_a_time(model)
        tie_parts(model, self._layers)
        return model

    def _pack(self, model: nn.Module, name: str, target: str, dtype: torch.dtype) -> None:
        """Pack the parameter `target`, stored as `name`."""
        manifest = self.quantization_config.manifest
        path, _, leaf = target.rpartition(".")
        module, entry = _submodule(model, path), manifest.tensors[name]
        if module is None or not can_pack(module, leaf):
            raise ModelError(
                f"the checkpoint packs {name!r}, but {type(model).__name__} has no layer there that can stay packed; "
                "load it with the architecture it was packed for, or make it dense with seedpack unpack"
            )
        is_layer = packed_class(module) is not None
        if is_layer and entry.transposed != is_transposed(module):
            raise ModelError(f"{name!r}: the weight is transposed between the checkpoint and {type(module).__name__}")
        shape = tuple(getattr(module, leaf).shape)
        if shape != entry.shape:
            raise ModelError(f"{name!r}: the checkpoint has shape {list(entry.shape)}, the model {list(shape)}")
        codec = codec_from_spec(manifest.codec_of(name))
        names = memory_names(pack_(module, leaf, codec, transposed=entry.transposed, dtype=dtype), leaf)
        for part, held in names.items():
            mark_initialised(module.get_parameter(held))
            self._on_disk[part_key(name, part)] = joined(path, held)
        if NO_VALUES in module._parameters:
            mark_initialised(module._parameters[NO_VALUES])
        if is_layer:
            self._layers.add(path)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Replace the conversions of dense experts by those that stack parts, and give parts their names in memory."""
        if model is None or not (self._expert_groups or self._on_disk):
            return weight_conversions
        patterns = {source: target for group in self._expert_groups for source, target in group.patterns().items()}
        stacking = [stacking_converter(source, target) for source, target in patterns.items()]
        kept = [entry for entry in weight_conversions if not self._is_replaced(entry)]
        return [*with_whole_names(kept, self._on_disk), *stacking]

    def _is_replaced(self, entry: Any) -> bool:
        if not is_converter(entry):
            return False
        if self._converters.isdisjoint(entry.source_patterns):
            return True
        targets = [str(pattern).removesuffix("$").rpartition(".")[2] for pattern in entry.target_patterns]
        return ".experts." in "".join(entry.source_patterns) and any(
            group.parameter in targets for group in self._expert_groups
        )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._wait_for_digests is not None:
            self._wait_for_digests()
            self._wait_for_digests = None
        _require_filled(model, self._uncovered if _is_spread(model) else unfilled_tensors(model))
        for name, module in model.named_modules():
            try:
                if isinstance(module, PartHolder):
                    module.put_float_first()
                check_(module)
            except CodecError as error:
                raise ModelError(f"{name}: {error}") from None
        if self._remove_packed is not None:
            self._remove_packed()
            self._remove_packed = None
            if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
                raise stays_on_disk()
        model.add_model_tags(["seedpack", f"{self.quantization_config.bits}-bit"])  # for the card of model.push_to_hub
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return True: save_pretrained writes the parts unchanged."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters train on top of packed layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: decoding is one opaque operator."""
        return True

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a saved config has its name
        suffix = f".{PRINCIPAL}"
        ties = {name: source for name, source in tied_parameters(model).items() if name.endswith(suffix)}
        tied = {name.removesuffix(suffix): source.removesuffix(suffix) for name, source in ties.items()}
        parts = {f"{name}.{memory_name(part)}": "" for name in tied for part in model.get_submodule(name).part_names}
        for module in list(model.modules()):
            unpack_(module, dtype)
        for name, source in tied.items():
            model.get_submodule(name).weight = model.get_submodule(source).weight
        dense = {f"{name}.weight": f"{source}.weight" for name, source in tied.items()}
        replace_ties(model, parts, dense)
        return model


def run_experts_one_at_a_time(model: Any) -> None:
    """Choose the implementation of packed experts that does not read all their weights as one tensor."""
    if hasattr(model, "set_experts_implementation") and any(map(_is_stack, model.modules())):
        model.set_experts_implementation("eager")


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, PackedParameters) and any(len(pieces[0].shape) > 2 for pieces in module.pieces.values())


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _known_tensors(manifest: Manifest, names: CheckpointNames) -> Manifest:
    """Return the manifest of the packed tensors that a model has; transformers reports the others as unexpected.

    Another architecture than the one that was packed may lack some that this one has: a base model has no head.
    """
    known = [name for name in manifest.tensors if names.has(name)]
    unknown = manifest.tensors.keys() - set(known)
    if not unknown:
        return manifest
    config = names.model.config
    cls = architecture({"architectures": getattr(config, "architectures", None)})
    if cls is not None and not isinstance(names.model, cls):
        with torch.device("meta"):
            packed = CheckpointNames(cls(config))
        unknown = {name for name in unknown if not packed.has(name)}
    if unknown or not known:
        raise ModelError(
            f"{type(names.model).__name__} has no layer for {len(unknown or manifest.tensors)} of the packed tensors, such as "
            f"{min(unknown or manifest.tensors)!r}; load the folder with the config.json and the architecture that it was "
            "packed with"
        )
    return manifest.select(known)


def _require_parts(manifest: Manifest, keys: set[str], names: CheckpointNames) -> None:
    """Refuse files that lack a part; when transformers has saved them again, keys can have lost the model's prefix."""

    def known_as(key: str) -> str:
        target, merged_by = names.parameter(key)
        return (key if merged_by else target).removeprefix(f"{names.model.base_model_prefix}.")

    lacking = {key for name in manifest.tensors for key in manifest.part_keys(name).values()} - keys
    if lacking:
        known = {known_as(key) for key in keys}
        lacking = {key for key in lacking if known_as(key) not in known}
    if lacking:
        raise _incomplete(lacking)


def _incomplete(lacking: Collection[str]) -> ModelError:
    return ModelError(
        f"the checkpoint lacks {len(lacking)} of the model's tensors, such as {min(lacking)!r}, which would be random numbers; "
        "fetch the whole checkpoint again, with the config.json that belongs to it"
    )


def _require_filled(model: Any, lacking: set[str]) -> None:
    """Refuse a model that lacks tensors, but for those that the packed architecture does not have, such as a new head.

    Args:
        model: loaded.
        lacking: names of its tensors that no file had.
    """
    architectures = getattr(model.config, "architectures", None) or ()
    if lacking and type(model).__name__ not in architectures:
        packed = {
            joined(name, leaf)
            for name, module in model.named_modules()
            if isinstance(module, (PackedModule, PackedParameters))
            for leaf, _ in module.named_parameters(recurse=False)
        }
        known, prefix = _names_in(architecture({"architectures": architectures}), model.config)
        lacking = {name for name in lacking if name in packed or name.removeprefix(prefix) in known}
    if lacking:
        raise _incomplete(lacking)


def _names_in(cls: Any, config: Any) -> tuple[set[str], str]:
    """Return the names of an architecture's tensors, without the prefix of its base model, and that prefix."""
    if cls is None:
        return set(), ""
    with torch.device("meta"):
        model = cls(config)
    prefix = f"{model.base_model_prefix}."
    return {name.removeprefix(prefix) for name in model.state_dict()}, prefix


def _is_spread(model: Any) -> bool:
    """Return whether a model is on several devices, or partly on disk: its tensors are other ones then than those loaded."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(places) > 1 or "disk" in places


def _require_all_layers(model: nn.Module, groups: list[ExpertGroup]) -> None:
    """Refuse a projection packed in some layers only: transformers has one conversion rule for all of them."""
    parameters = {group.parameter for group in groups}
    packed = {(group.module, group.parameter) for group in groups}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if leaf in parameters and parameter.dim() == 3 and path.endswith(".experts") and (path, leaf) not in packed:
            raise ModelError(f"{name}: experts are packed in some layers but not in this one; pack the model again")


def tie_parts(model: Any, packed: set[str]) -> None:
    """Pack each output head that is tied to a packed embedding, and tie each of its parts."""
    before, after = [], dict[str, str]()
    for target, source in tied_parameters(model).items():
        path, head_path = source.removesuffix(".weight"), target.removesuffix(".weight")
        if path not in packed:
            continue
        embedding, head = model.get_submodule(path), model.get_submodule(head_path)
        if not isinstance(head, PackedModule):
            if packed_class(head) is None:
                raise ModelError(f"{target}: tied to the packed {source}, but a {type(head).__name__} cannot be packed")
            pack_module_(head, embedding.codec, dtype=embedding.compute_dtype)
        before.append(target)
        names = map(memory_name, embedding.part_names)
        after |= {f"{head_path}.{name}": f"{path}.{name}" for name in names}
    replace_ties(model, before, after)
