"""Wrap every part of transformers that is not its public interface.

All that seedpack uses and transformers may move without notice is in this file, as it stands from 5.17 to 5.24. The
bounds of `transformers` in pyproject.toml are these; raise the upper one when the tests pass with a newer release.

What is used, and what breaks if it moves:

- `quantizers.auto`, its two mappings by method: transformers does not know packed models.
- the list `checkpoint_files` that quantisers are given, and `tie_weights`, which is replaced meanwhile: dense models are
  not packed on the fly.
- `conversion_mapping.get_model_conversion_mapping`, `core_model_loading.rename_source_key`: names of a checkpoint are
  not matched to the model's.
- `core_model_loading.WeightConverter`, `MergeModulelist`, `SplitModulelist`, `_original_source_patterns`: mixtures of
  experts are neither packed nor loaded.
- `core_model_loading.dot_natural_key`, `WeightConverter.add_tensor` and `.convert`: what is merged, split or transposed on
  loading stays raw.
- `core_model_loading.WeightRenaming`: parts of packed layers are not loaded.
- `_weight_conversions`: models that seedpack filled are saved under other names than those that are loaded.
- `all_tied_weights_keys`, `_tied_weights_keys`: tied weights are packed and saved twice.
- `_is_hf_initialized`: transformers tries to draw random numbers for packed parts, and parts that a checkpoint lacks are
  not noticed.
- `_keys_to_ignore_on_load_missing`: models are refused for lack of parameters that they can do without.
- `GenerateDecoderOnlyOutput.cache`, which releases before 5.24 call `past_key_values`: a conversation is read again for
  every answer.
- `modeling_layers.GradientCheckpointingLayer`: no decoder layers are found, so calibration refuses the model.
- `modeling_gguf_pytorch_utils`: `load_gguf_checkpoint`, `TensorProcessor`, `TENSOR_PROCESSORS`, `get_gguf_hf_weights_map`;
  `integrations.gguf`, its `GGUF_ARCHS`: GGUF files are read whole.
- `cli.transformers.app`, the program `transformers`: `seedpack serve` does not start.
- `models.auto.modeling_auto`, its `MODEL_…_MAPPING_NAMES`: `eval` does not know what a model is for.

`hf/quantizer.py` also overrides the hooks of `HfQuantizer` that begin with an underscore, as every quantiser does.
Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

from seedpack.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

QUANTIZERS_MODULE = "transformers.quantizers.auto"


class OutsideOfLoading:
    """A context in which models are built as when it was made, to be entered while transformers loads another one.

    transformers ties nothing meanwhile, and torch makes tensors on the meta device, in the model's dtype.
    """

    def __init__(self) -> None:
        from transformers import PreTrainedModel

        self._tie_weights = PreTrainedModel.tie_weights

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Enter it."""
        import torch
        from transformers import PreTrainedModel

        inside, dtype = PreTrainedModel.tie_weights, torch.get_default_dtype()
        try:
            PreTrainedModel.tie_weights = self._tie_weights  # type: ignore[method-assign]
            torch.set_default_dtype(torch.float32)
            with torch.device("cpu"):
                yield
        finally:
            PreTrainedModel.tie_weights = inside  # type: ignore[method-assign]
            torch.set_default_dtype(dtype)


def register_quantizer(quantizers: ModuleType, method: str, quantizer: Any, config: Any) -> None:
    """Add a quantisation method to `transformers.quantizers.auto`, which is given because it may be half imported."""
    quantizers.AUTO_QUANTIZER_MAPPING[method] = quantizer
    quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config


def conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """Return the renamings, and the converters that merge or split, that transformers loads a model's checkpoints by."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = get_model_conversion_mapping(model)
    return [entry for entry in mapping if not is_converter(entry)], [entry for entry in mapping if is_converter(entry)]


def is_converter(entry: Any) -> bool:
    """Return whether an entry of a conversion mapping merges or splits tensors, instead of only renaming them."""
    from transformers.core_model_loading import WeightConverter

    return isinstance(entry, WeightConverter)


def model_name_of(
    name: str, renamings: list[Any], converters: list[Any], prefix: str, state: dict[str, Any]
) -> tuple[str, str | None]:
    """Return the model's name of a checkpoint tensor, and the pattern of the converter that merges it, if one does.

    Args:
        name: the checkpoint's.
        renamings, converters: of the model, from `conversions`.
        prefix: the model's `base_model_prefix`.
        state: the model's state dict.
    """
    from transformers.core_model_loading import rename_source_key

    renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
    if renamed not in state and name in state:
        renamed, pattern = rename_source_key(name, [], [], prefix, state)
    return renamed, pattern


def convert(model: Any, converter: Any, first: str, tensors: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Return what a converter of a model makes of some tensors, by the model's names; nothing where it fails.

    Args:
        model: on the meta device.
        converter: of the model, which stays as it is.
        first: the model's name of the first tensor that is made.
        tensors: with the pattern of the converter that each matches, by the checkpoint's names.
    """
    converter = copy.deepcopy(converter)
    for name in sorted(tensors, key=dot_natural_key()):
        converter.add_tensor(first, name, *tensors[name])
    try:
        made = converter.convert(first, model=model, config=model.config)
    except Exception:  # foreign code, and a checkpoint of another form
        return {}
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def dot_natural_key() -> Any:
    """Return the key by which transformers sorts the names of a checkpoint."""
    from transformers import core_model_loading

    return core_model_loading.dot_natural_key


def source_patterns(converter: Any) -> list[str]:
    """Return the patterns of the names that a converter merges, in order and as they were before it was compiled."""
    patterns = getattr(converter, "_original_source_patterns", None) or converter.source_patterns
    return [patterns] if isinstance(patterns, str) else list(patterns)


def operation_names(converter: Any) -> list[str]:
    """Return the class names of a converter's operations, in order."""
    return [type(operation).__name__ for operation in converter.operations]


def with_whole_names(conversions: list[Any], on_disk: Mapping[str, str]) -> list[Any]:
    """Return conversions that also rename some tensors by their whole names, whatever the patterns among them do to these.

    Args:
        conversions: of a model.
        on_disk: {name in a checkpoint: name in memory}.
    """
    renamings = [entry for entry in conversions if not is_converter(entry)]
    loaded = {_renamed(name, renamings): memory for name, memory in on_disk.items()}
    return [whole_names({}, renamings, on_disk), *conversions, whole_names(loaded)]


def _renamed(name: str, renamings: Iterable[Any]) -> str:
    for entry in renamings:
        name = entry.rename_source_key(name)[0]
    return name


def whole_names(
    names: Mapping[str, str], undone: Sequence[Any] = (), on_disk: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """Return a renaming by a dictionary.

    Args:
        names: {before: after}.
        undone: the renamings that are undone on saving before this one is.
        on_disk: {name in a checkpoint: name in memory}, which is undone on saving.
    """
    return _whole_names()(dict(names), list(undone), dict(on_disk))


@cache
def _whole_names() -> type[Any]:
    from transformers.core_model_loading import WeightRenaming

    class WholeNames(WeightRenaming):
        __slots__ = ("names", "on_disk", "undone")

        def __init__(self, *state: Any):
            super().__init__("(?!)", "-")
            self.names, self.undone, self.on_disk = state

        def __reduce__(self) -> Any:
            return whole_names, (self.names, self.undone, self.on_disk)

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            return self.names.get(source_key, source_key), None

        def was_used(self) -> bool:
            return True

        def reverse_transform(self) -> Any:
            """Transformers undoes those that it had a use for."""
            back = [entry.reverse_transform() for entry in reversed(self.undone) if entry.was_used()]
            return whole_names({_renamed(memory, back): name for name, memory in self.on_disk.items()})

    return WholeNames


def attach_quantizer(model: Any, quantizer: Any, on_disk: Mapping[str, str]) -> None:
    """Have a model that transformers did not load saved by a quantiser, every tensor under its own name.

    Args:
        model: of transformers.
        quantizer: whose configuration becomes the model's.
        on_disk: {name in a checkpoint: name in memory}, where they differ.
    """
    model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config
    model._weight_conversions = [whole_names({}, (), on_disk)]


def splits(converter: Any) -> bool:
    """Return whether a converter makes several tensors."""
    return len(converter.target_patterns) > 1


def stacking_converter(source: str, target: str) -> Any:
    """Return a converter that stacks experts' tensors on loading, experts first, and takes them apart on saving.

    Args:
        source: the pattern of their names on disk, with `*` for the expert.
        target: the end of the stacked parameter's name.
    """
    from transformers.core_model_loading import WeightConverter

    return WeightConverter([source], [target], operations=[_stacking_operation()(dim=0)])


@cache
def _stacking_operation() -> type[Any]:
    from transformers.core_model_loading import MergeModulelist, SplitModulelist

    class StackParts(MergeModulelist):
        @property
        def reverse_op(self) -> UnstackParts:
            return UnstackParts(dim=self.dim)

    class UnstackParts(SplitModulelist):
        def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            """Split, then restore each part's shape: transformers 5.17 drops axes of length one."""
            (value,) = input_dict.values()
            stacked = value[0] if isinstance(value, list) else value
            parts: dict[str, Any] = super().convert(input_dict, *args, **kwargs)  # type: ignore[type-var]
            return {name: part.reshape(stacked.shape[1:]) for name, part in parts.items()}

        @property
        def reverse_op(self) -> StackParts:
            return StackParts(dim=self.dim)

    return StackParts


def tied_parameters(model: Any) -> dict[str, str]:
    """Return the parameters that are tied to another one, {tied: the one that is stored}."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def replace_ties(model: Any, before: Collection[str], after: Mapping[str, str]) -> None:
    """Replace ties {tied: source} of a model: for loading, and for saving, which asks for the names that may be shared."""
    if not before and not after:
        return
    fixed = isinstance(getattr(type(model), "_tied_weights_keys", None), property)
    for attribute in ("all_tied_weights_keys",) if fixed else ("all_tied_weights_keys", "_tied_weights_keys"):
        known = getattr(model, attribute, None)
        kept = {
            name: source for name, source in (known if isinstance(known, dict) else {}).items() if name not in before
        }
        setattr(model, attribute, kept | dict(after))


def mark_initialised(target: Any) -> None:
    """Keep transformers from drawing random numbers for a parameter, or for all of a module."""
    target._is_hf_initialized = True


def unfilled_tensors(model: Any) -> set[str]:
    """Return the names of a loaded model's tensors that no file had and that are not tied to one that a file had.

    Loading gives each a new tensor with the mark of `mark_initialised`, which has data unless all of the model has none.
    """
    state = model.state_dict(keep_vars=True)
    if all(value.is_meta for value in state.values()):
        return set()
    return needed(model, {n for n, v in state.items() if v.is_meta or not getattr(v, "_is_hf_initialized", False)})


def needed(model: Any, names: Collection[str]) -> set[str]:
    """Return those of a model's tensors that transformers does not start by itself, and that are no counters."""
    ignored = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_missing", None) or ["(?!)"]))
    return {name for name in names if not ignored.search(name) and not is_counter(name)}


def is_counter(name: str) -> bool:
    """Return whether a tensor only counts batches, as old checkpoints do not."""
    return name.endswith(".num_batches_tracked")


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that a transformers model is a stack of, by name."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)}
    return {name: layer for name, layer in layers.items() if not any(name.startswith(f"{outer}.") for outer in layers)}


def cache_name() -> str:
    """Return the name that `generate` gives to its cache, as an argument and in its output."""
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"


def auto_class_names(mapping: str) -> set[str]:
    """Return the names of the model classes that an Auto class chooses from; `mapping` is such as "FOR_CAUSAL_LM_", or empty."""
    from transformers.models.auto import modeling_auto

    entries = getattr(modeling_auto, f"MODEL_{mapping}MAPPING_NAMES").values()
    return {name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)}


def gguf_config(path: str) -> dict[str, Any]:
    """Return the config that transformers makes of a GGUF file's fields."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config: dict[str, Any] = load_gguf_checkpoint(path, return_tensors=False)["config"]
    return config


class GGUFConversion:
    """The conversion by which transformers makes a model's tensors of those of a GGUF file, for some tensors at a time.

    Args:
        config: from `gguf_config`.
        architecture: that the file names.
        model: on the meta device.

    Attributes:
        names: of the model's tensors, by those of the file; experts' without their `.weight`.
    """

    def __init__(self, config: dict[str, Any], architecture: str, model: Any):
        from transformers import modeling_gguf_pytorch_utils as legacy

        processor: Any = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)
        self._processor = processor(config=config)
        self.names: dict[str, str] = legacy.get_gguf_hf_weights_map(model, self._processor)

    def convert(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return what becomes of some tensors, by the model's names.

        Args:
            tensors: dequantised NumPy arrays, by the file's names; all that one of the model's is made of.
        """
        import torch

        made: dict[str, Any] = {}
        for name, array in tensors.items():
            result = self._processor.process(
                weights=array, name=name, tensor_key_mapping=self.names, parsed_parameters={"tensors": made}
            )
            if result.name in self.names:
                made[self.names[result.name]] = torch.from_numpy(result.weights)
        return made


def converts_gguf_at_once(architecture: str) -> bool:
    """Return whether transformers loads the GGUF files of an architecture by another conversion than `GGUFConversion`."""
    from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS

    return architecture in GGUF_ARCHS


def serving() -> Callable[[list[str]], None]:
    """Return `transformers serve` as a function of its arguments, in this process, where packed folders are known."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ModelError("transformers' server needs more packages: pip install 'seedpack-torch[serve]'")
    from transformers.cli.transformers import app

    return lambda arguments: app(["serve", *arguments])
