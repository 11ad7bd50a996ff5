"""Loading and saving packed models through transformers.

Before the weights are read the modules of the skeleton are packed in place (their parts on the meta device), so that
transformers loads the parts like any other parameters. Only the stable hooks of `HfQuantizer` are used.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn
from transformers.quantizers.base import HfQuantizer

from seedpack.codecs.registry import codec_from_spec
from seedpack.errors import CodecError, ModelError
from seedpack.hf.checkpoint_names import CheckpointNames
from seedpack.hf.config import SeedpackConfig
from seedpack.hf.experts import ExpertGroup, check_experts, pack_experts_, unpack_experts_
from seedpack.hf.stacking import StackParts
from seedpack.loader.layers import PackedModule, is_transposed, pack_module_, packed_class, unpack_module_


class SeedpackQuantizer(HfQuantizer):
    """The quantiser that transformers asks; one for each `from_pretrained`."""

    requires_calibration = True  # from_pretrained(dense, quantization_config=…) is refused: seedpack compress packs
    quantization_config: SeedpackConfig

    def __init__(self, quantization_config: SeedpackConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._expert_groups: list[ExpertGroup] = []

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        dtype = model.config.dtype
        manifest = self.quantization_config.manifest
        skeleton = CheckpointNames(model)
        experts: dict[str, list[str]] = defaultdict(list)
        packed: set[str] = set()
        for name in manifest.tensors:
            expert = skeleton.expert(name)
            if expert is not None:
                experts[expert.module].append(name)
                continue
            target, _ = skeleton.parameter(name)
            path, _, leaf = target.rpartition(".")
            module = _submodule(model, path)
            if leaf != "weight" or module is None or packed_class(module) is None:
                raise ModelError(
                    f"the checkpoint packs {name!r}, but {type(model).__name__} has no layer there that can stay packed; "
                    "load it with the architecture it was packed for, or make it dense with seedpack unpack"
                )
            if manifest.tensors[name].transposed != is_transposed(module):
                raise ModelError(
                    f"{name!r}: the checkpoint and {type(module).__name__} hold the weight the other way round"
                )
            shape = tuple(module.weight.shape)  # type: ignore[arg-type]
            if shape != manifest.tensors[name].shape:
                raise ModelError(
                    f"{name!r}: the checkpoint has shape {list(manifest.tensors[name].shape)}, the model {list(shape)}"
                )
            layer = pack_module_(module, codec_from_spec(manifest.codec_of(name)), dtype=dtype)
            for part in layer.packed_parts().values():
                part._is_hf_initialized = True  # type: ignore[attr-defined]  # never to be drawn at random
            packed.add(path)
        self._expert_groups = [
            group
            for path, names in experts.items()
            for group in pack_experts_(model, path, names, skeleton, manifest, dtype)
        ]
        _require_whole(model, self._expert_groups)
        if experts and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the others read all experts' weights as one tensor
        _tie_parts(model, packed)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Have the parts of each expert projection stacked, in place of the dense matrices."""
        if not self._expert_groups:
            return weight_conversions
        from transformers.core_model_loading import WeightConverter

        ours = []
        seen = set()
        for group in self._expert_groups:
            for part in group.part_names:
                source, target = group.patterns(part)
                if source not in seen:
                    seen.add(source)
                    ours.append(WeightConverter([source], [target], operations=[StackParts(dim=0)]))
        return [entry for entry in weight_conversions if not self._is_replaced(entry)] + ours

    def _is_replaced(self, entry: Any) -> bool:
        from transformers.core_model_loading import WeightConverter

        if not isinstance(entry, WeightConverter):
            return False
        targets = [str(pattern).removesuffix("$").rpartition(".")[2] for pattern in entry.target_patterns]
        return ".experts." in "".join(entry.source_patterns) and any(
            group.parameter in targets for group in self._expert_groups
        )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            try:
                if isinstance(module, PackedModule):
                    module.codec.check(module.packed_parts(), module.matrix)
                check_experts(module)
            except CodecError as error:
                raise ModelError(f"{name}.weight: {error}") from None
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """save_pretrained writes the parts as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top of packed layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Decoding is one opaque operator."""
        return True

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        tied = [
            (name, source)
            for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
            if name.endswith(".weight") and isinstance(_submodule(model, source.removesuffix(".weight")), PackedModule)
        ]
        for module in list(model.modules()):
            if isinstance(module, PackedModule):
                unpack_module_(module, dtype)
        unpack_experts_(model, dtype)
        for name, source in tied:
            target = model.get_submodule(name.removesuffix(".weight"))
            target.weight = model.get_submodule(source.removesuffix(".weight")).weight
        if tied:
            _forget_part_ties(model)
        return model


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _require_whole(model: nn.Module, groups: list[ExpertGroup]) -> None:
    """A projection packed in one layer and dense in another would meet one conversion rule of transformers for both."""
    packed = {group.parameter for group in groups}
    done = {(group.module, group.parameter) for group in groups}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if leaf in packed and parameter.dim() == 3 and path.endswith(".experts") and (path, leaf) not in done:
            raise ModelError(f"{name}: experts are packed in some layers and not in this one; pack the model again")


def _tie_parts(model: Any, packed: set[str]) -> None:
    """Where a packed embedding is tied to an output head, pack the head too and tie each part.

    transformers keeps {tied: source} in `all_tied_weights_keys` while loading, and consults the class's
    `_tied_weights_keys` while saving: the instance gets its own.
    """
    tied = getattr(model, "all_tied_weights_keys", None)
    if not tied:
        return
    added = {}
    for target, source in list(tied.items()):
        path = source.removesuffix(".weight")
        if path not in packed:
            continue
        embedding = model.get_submodule(path)
        head = model.get_submodule(target.removesuffix(".weight"))
        if not isinstance(head, PackedModule):
            if packed_class(head) is None:
                raise ModelError(f"{target}: tied to the packed {source}, but a {type(head).__name__} cannot be packed")
            pack_module_(head, embedding.codec, dtype=embedding.compute_dtype)
        for part in embedding.codec.parts(embedding.matrix):
            added[f"{target.removesuffix('.weight')}.{part}"] = f"{path}.{part}"
    tied.update(added)
    own = getattr(model, "_tied_weights_keys", None)
    if added and isinstance(own, dict):
        model._tied_weights_keys = {**own, **added}


def _forget_part_ties(model: Any) -> None:
    """Undo `_tie_parts`, whose names are the only ones of parts that no longer exist."""
    model.__dict__.pop("_tied_weights_keys", None)
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = model.all_tied_weights_keys
    for name in [name for name in tied if name not in known]:
        del tied[name]
