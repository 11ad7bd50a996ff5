"""Tiny configs: those of transformers with every size small."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.language.architectures.overrides import OVERRIDES
from benchmarks.language.architectures.rules import HEAD_WIDTH, HEADS, LAYERS, VOCABULARY, small

VARIANTS = ("grouped", "ungrouped", "first layers")
SPECIAL = {"pad": 0, "bos": 1, "eos": 2}
TOKEN = re.compile(r".*(token_id|token_index|_token|token_ids)$|.*_index$|.*_id$")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers")
LEFT_OUT = ("id2label", "label2id", "architectures", "dtype", "transformers_version", "chunk_size_feed_forward")
MROPE = ("paddleocr_vl_text",)  # whose configs do not say that they take an `mrope_section`


def config_for(model_type: str, model_class: Any, variant: str) -> Any:
    """Return the tiny config of a type, or the part of it that a class takes.

    Args:
        model_type: of transformers' `CONFIG_MAPPING`.
        model_class: that the config is for.
        variant: "grouped" has fewer key/value heads than heads, "ungrouped" as many; in "first layers"
            lists of an entry per layer stay whole.
    """
    config = TinyConfigs(variant).shrunk(CONFIG_MAPPING[model_type]())
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in vars(config).values() if isinstance(part, wanted)), config)


class TinyConfigs:
    """Shrinks a config and its parts; the same special token gets the same id in all of them."""

    def __init__(self, variant: str):
        self._variant = variant
        self._token_ids: dict[str, int] = {}

    def shrunk(self, config: Any) -> Any:
        """Return a small config of the same class."""
        cls: Any = type(config)
        model_type = getattr(cls, "model_type", "")
        overrides = {name: v() if callable(v) else v for name, v in OVERRIDES.get(model_type, {}).items()}
        own, defaults = entries(config), default_entries(cls)
        depth, layers = representative_layers(own)
        changed: dict[str, Any] = {}
        for name, value in own.items():
            if isinstance(value, transformers.PreTrainedConfig) and name not in overrides:
                changed[name] = self.shrunk(value)
            elif name not in overrides and name not in LEFT_OUT:
                new = self._ungrouped(name, value, self._small(name, value, depth, layers), own)
                if name not in defaults or new != defaults[name] or type(new) is not type(defaults[name]):
                    changed[name] = new
        made = cls(**changed, **overrides)
        add_mrope(made)
        return made

    def _small(self, name: str, value: Any, depth: int, layers: Sequence[int]) -> Any:
        """Return an entry's value in the small config."""
        if name in ("rope_parameters", "rope_scaling") or (isinstance(value, dict) and "rope" in name):
            return small_rope(value)
        if self._variant != "first layers" and is_per_layer(name, value, depth):
            return type(value)(value[i] for i in layers)
        if TOKEN.fullmatch(name):
            return self._token_id(name, value)
        if name in DEPTHS and isinstance(value, int):
            return len(layers)
        return HEAD_WIDTH if name == "head_dim" and value is None else small(name, value)

    def _ungrouped(self, name: str, value: Any, new: Any, own: dict[str, Any]) -> Any:
        """Return as many key/value heads as heads where the model has so many, or this variant wants it."""
        if not isinstance(new, int):
            return new
        wanted = self._variant == "ungrouped" and name in ("num_key_value_heads", "num_kv_heads")
        equal = isinstance(value, int) and "key_value" in name and own.get("num_attention_heads") == value
        return HEADS if wanted or equal else new

    def _token_id(self, name: str, value: Any) -> Any:
        """Return a token's id in the small vocabulary."""
        for kind, index in SPECIAL.items():
            if re.fullmatch(rf"(.*_)?{kind}_(token_)?(id|index)", name):
                if isinstance(value, (list, tuple)):
                    return [index]
                return index if isinstance(value, int) and value >= VOCABULARY else value
        if not isinstance(value, int) or value < VOCABULARY:
            return value
        return self._token_ids.setdefault(name, VOCABULARY - 1 - len(self._token_ids))


def is_per_layer(name: str, value: Any, depth: int) -> bool:
    """Tell whether an entry is a list of something for each layer."""
    return isinstance(value, (list, tuple)) and len(value) == depth > 2 and not re.search("out_|indic", name)


def entries(config: Any) -> dict[str, Any]:
    """Return a config's own entries by the names that its constructor takes."""
    cls = type(config)
    names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else config.to_dict()
    stored = {name: config.attribute_map.get(name, name) for name in names if not name.startswith("_")}
    return {name: vars(config)[at] for name, at in stored.items() if at in vars(config)}


def default_entries(cls: Any) -> dict[str, Any]:
    """Return the entries of a config made without arguments; none if it cannot be."""
    try:
        return entries(cls())
    except Exception:  # each config checks itself in its own way
        return {}


def representative_layers(own: dict[str, Any]) -> tuple[int, Sequence[int]]:
    """Return the count of layers, and up to four of different kinds, where lists of names tell the kinds."""
    depth = next((own[name] for name in DEPTHS if isinstance(own.get(name), int)), 0)
    lists = [v for v in own.values() if isinstance(v, (list, tuple)) and len(v) == depth > 2]
    kinds = [v for v in lists if all(isinstance(kind, str) for kind in v)]
    if not kinds:
        return depth, range(min(depth, LAYERS))
    first: dict[tuple[str, ...], int] = {}
    for layer, kind in enumerate(zip(*kinds, strict=True)):
        first.setdefault(kind, layer)
    layers = sorted(first.values())[:4]
    return depth, layers if len(layers) > 1 else [layers[0], layers[0] + 1]


def small_rope(value: Any) -> Any:
    """Return the settings of a rotary embedding for heads of `HEAD_WIDTH`."""
    if not isinstance(value, dict):
        return value
    half = HEAD_WIDTH // 2
    new = {name: small_rope(setting) for name, setting in value.items()}
    if "mrope_section" in value and not isinstance(value["mrope_section"], dict):
        new["mrope_section"] = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    for name in ("long_factor", "short_factor"):
        if isinstance(value.get(name), (list, tuple)):
            new[name] = list(value[name])[:half]
    if not isinstance(value.get("original_max_position_embeddings", {}), dict):
        new["original_max_position_embeddings"] = 64
    return new


def add_mrope(config: Any) -> None:
    """Give rotary embeddings of time, height and width a section for each, where a config wants it."""
    rope: Any = vars(config).get("rope_parameters")
    ignored = getattr(type(config), "ignore_keys_at_rope_validation", None) or ()
    if not isinstance(rope, dict) or ("mrope_section" not in ignored and config.model_type not in MROPE):
        return
    for part in [rope] if "rope_type" in rope else [v for v in rope.values() if isinstance(v, dict)]:
        share = part.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)
        half = int((vars(config).get("head_dim") or HEAD_WIDTH) * share) // 2
        part["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
