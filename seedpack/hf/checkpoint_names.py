"""Names of a checkpoint and the modules of a transformers model that they belong to.

transformers renames and merges tensors while it loads (base-model prefixes, legacy names, experts of a mixture that
lie apart on disk and in one 3-D parameter in memory). The same functions are asked here, so that a plan and a loader
agree with it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.converter.sources.base import Kind
from seedpack.converter.sources.module import module_kind
from seedpack.errors import ModelError, first_line
from seedpack.hf import internals
from seedpack.hf.norm_power import norm_before_layer, output_power
from seedpack.hf.quantization import strip_quantization
from seedpack.hf.trial import refused_parameters

_EXPERT = re.compile(r"(?P<prefix>.*\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)\.weight")


@dataclass(frozen=True)
class Expert:
    """One expert's matrix: it becomes part of parameter `parameter` of the experts module at `module`."""

    module: str
    parameter: str
    projection: str
    index: int


def architecture(config: object) -> Any:
    """Return the transformers class that a config.json names, or None; only model classes are looked up."""
    import transformers

    names = config.get("architectures") if isinstance(config, dict) else None
    name = names[0] if isinstance(names, list) and names else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    return cls if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else None


class CheckpointNames:
    """Finds the module of each name of a checkpoint in a model, which may be on meta or loaded."""

    def __init__(self, model: Any):
        self.model = model
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._state = model.state_dict()

    @classmethod
    def of_folder(cls, path: Path) -> CheckpointNames:
        """Build the dense model of a config.json on the meta device."""
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(path)
            strip_quantization(config)
            known = architecture({"architectures": getattr(config, "architectures", None)})
            with torch.device("meta"):
                model = known(config) if known else transformers.AutoModel.from_config(config)
        except Exception as error:  # configs are checked by each model in its own way, or not at all
            raise ModelError(
                f"{path}: transformers {transformers.__version__} cannot build this model ({first_line(error)}); "
                "pass its weight file instead to pack it as a state dict"
            ) from None
        return cls(model)

    @cached_property
    def tied(self) -> dict[str, str]:
        """Parameters that are tied to another one: {tied: the one that is stored}."""
        return internals.tied_parameters(self.model)

    @cached_property
    def _norms(self) -> dict[str, str]:
        return norm_before_layer(self.model)

    def norm_power(self, name: str, stored: Mapping[str, str], read: Callable[[str], Tensor]) -> Tensor | None:
        """Return the power of each input channel of a checkpoint tensor's layer [in], if it takes the output of a norm.

        Args:
            name: the tensor's.
            stored: names of the checkpoint by those of the model.
            read: gives a tensor of the checkpoint.
        """
        for layer in sorted(parameter.rpartition(".")[0] for parameter in self.parameters(name)):
            norm = self._norms.get(layer)
            if norm is None:
                continue
            names = {leaf: stored.get(f"{norm}.{leaf}") for leaf, _ in self._modules[norm].named_parameters()}
            if None not in names.values():
                with suppress(Exception):  # foreign code: a norm that wants more than its input tells nothing
                    return output_power(self._modules[norm], {leaf: read(str(name)) for leaf, name in names.items()})
        return None

    @cached_property
    def _conversions(self) -> tuple[list[Any], list[Any]]:
        return internals.conversions(self.model)

    def parameter(self, name: str) -> tuple[str, str | None]:
        """Return the model's name of a checkpoint tensor, and the merging pattern that took part, if any."""
        renamings, converters = self._conversions
        return internals.model_name_of(name, renamings, converters, self.model.base_model_prefix, self._state)

    def converter(self, pattern: str | None) -> Any:
        """Return the conversion of a pattern."""
        return next(entry for entry in self._conversions[1] if pattern in entry.source_patterns)

    def converted_by(self, name: str) -> str | None:
        """Return the pattern by which transformers converts a checkpoint tensor; None if not, or if it merely stacks experts."""
        target, pattern = self.parameter(name)
        return pattern if pattern is not None and target in self._state and self.expert(name) is None else None

    def restricted(self, names: Iterable[str]) -> CheckpointNames:
        """Return these names with only the conversions that a checkpoint of some names needs: not of those in the model."""
        renamings, converters = self._conversions
        needed = {self.parameter(name)[1] for name in names if not self._is_own(name)}
        restricted = copy.copy(self)
        restricted._conversions = renamings, [c for c in converters if not needed.isdisjoint(c.source_patterns)]
        return restricted

    @property
    def converters(self) -> set[str]:
        """The patterns of the conversions."""
        return {pattern for converter in self._conversions[1] for pattern in converter.source_patterns}

    def _is_own(self, name: str) -> bool:
        """Return whether a name is one of the model's, but for the prefix of the base model."""
        return internals.model_name_of(name, [], [], self.model.base_model_prefix, self._state)[0] in self._state

    @property
    def names(self) -> list[str]:
        """The names of the model's tensors."""
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of one of the model's tensors, or None if it has none of that name."""
        return tuple(self._state[name].shape) if name in self._state else None

    def has(self, name: str) -> bool:
        """Return whether the model has a place for a checkpoint tensor."""
        return self.parameter(name)[0] in self._state

    def parameters(self, name: str) -> list[str]:
        """Return the model's names of a checkpoint tensor: of its parameter, and of those tied to it."""
        target = self.parameter(name)[0]
        return [target, *(tied for tied, origin in self.tied.items() if origin == target)]

    def expert(self, name: str) -> Expert | None:
        """Return where an expert's matrix goes, if it is one that is merely stacked and concatenated in memory."""
        match = _EXPERT.fullmatch(name)
        if match is None:
            return None
        target, pattern = self.parameter(name)
        module, _, parameter = target.rpartition(".")
        if pattern is None or target not in self._state or self._state[target].dim() != 3:
            return None
        converter = self.converter(pattern)
        if internals.operation_names(converter) not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            return None
        return Expert(module, parameter, match["projection"], int(match["index"]))

    def projections(self, name: str) -> list[str]:
        """Return the projections that make up one expert parameter, in order, from one of its tensors' names."""
        _, pattern = self.parameter(name)
        converter = self.converter(pattern)
        sources = internals.source_patterns(converter)
        return [
            source.removesuffix(".weight").removesuffix("$").rpartition(".")[2].replace("\\", "") for source in sources
        ]

    def uncovered(self, names: Collection[str]) -> set[str]:
        """Return the model's tensors that nothing of a checkpoint goes into, by the names in it.

        Tensors that loading splits are not followed: then none are returned.
        """
        if any(map(internals.splits, self._conversions[1])):
            return set()
        return set(self._state) - {self.parameter(name)[0] for name in names} - self.tied.keys()

    def missing_experts(self, names: Collection[str]) -> list[str]:
        """Return the experts' matrices that a checkpoint of these names lacks."""
        mixtures: dict[tuple[str, str], tuple[str, int]] = {}  # (prefix, parameter): one of its names, count of experts
        for name in names:
            match, expert = _EXPERT.fullmatch(name), self.expert(name)
            if match is not None and expert is not None:
                count = self._state[f"{expert.module}.{expert.parameter}"].shape[0]
                mixtures.setdefault((match["prefix"], expert.parameter), (name, count))
        wanted = {
            f"{prefix}.{index}.{projection}.weight"
            for (prefix, _), (name, count) in mixtures.items()
            for projection in self.projections(name)
            for index in range(count)
        }
        return sorted(wanted - set(names))

    def kind(self, name: str, shape: tuple[int, ...]) -> Kind:
        """Tell how a checkpoint tensor is packed."""
        expert = self.expert(name)
        if expert is not None:
            return Kind("expert", group=f"{expert.module}.{expert.parameter}")
        target, pattern = self.parameter(name)
        module = target.rpartition(".")[0]
        if pattern is not None:
            return Kind(note="made into others when transformers loads it")
        if target not in self._state or tuple(self._state[target].shape) != shape:
            return Kind(note="has no parameter of its shape in the model")
        if target in self._refused:
            return Kind(note=self._refused[target])
        kind = module_kind(self._modules, target)
        if kind.kind == "matrix" and target in self._tied_names:
            return Kind(note="tied to another parameter")
        return kind._replace(kind="head") if kind.kind and module in self._heads else kind

    @cached_property
    def _tied_names(self) -> set[str]:
        return {*self.tied, *self.tied.values()}

    @cached_property
    def _refused(self) -> dict[str, str]:
        """Parameters that have to stay dense, with the reason."""

        def make() -> nn.Module:
            with torch.device("meta"):
                return type(self.model)(self.model.config)  # type: ignore[no-any-return]

        return refused_parameters(make)

    @cached_property
    def _heads(self) -> set[str]:
        """Modules that are a language model's output projection, or the embedding that is tied to it."""
        head = self.model.get_output_embeddings()
        names = {name for name, module in self._modules.items() if module is head and hasattr(head, "weight")}
        tied = {self.tied.get(f"{name}.weight", "").rpartition(".")[0] for name in names}
        return names | tied - {""}
