"""Packed tensors for which a model of vLLM has no layer that stays packed: they are made dense while they are loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from seedpack.codecs.registry import codec_from_spec
from seedpack.formats import Manifest
from seedpack.loader.layers import codec_matrix
from seedpack.vllm.pieces import require_digest

logger = init_logger(__name__)


def dense_weights(
    weights: Iterable[tuple[str, Tensor]], manifest: Manifest, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors, those of a manifest decoded in their dense shape, all others as they come.

    Args:
        weights: names and tensors; each packed tensor comes in parts.
        manifest: of the tensors to decode.
        dtype: that they are decoded in.
    """
    owners = {key: (name, part) for name in manifest.tensors for part, key in manifest.part_keys(name).items()}
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in weights:
        if key not in owners:
            yield key, value
            continue
        name, part = owners[key]
        entry = manifest.tensors[name]
        require_digest(name, part, value, entry.parts)
        parts[name][part] = value
        if parts[name].keys() == entry.parts.keys():
            codec, matrix = codec_from_spec(manifest.codec_of(name)), codec_matrix(entry.shape, entry.transposed)
            found = parts.pop(name)
            codec.check(found, matrix)
            weight = codec.decode(found, matrix, dtype)
            yield name, (weight.mT if entry.transposed else weight).reshape(entry.shape)


def decode_what_stays_dense() -> None:
    """Have vLLM's loader of safetensors decode the tensors that its layers take no other way; asked once or again."""
    read = DefaultModelLoader.get_all_weights
    if hasattr(read, "of_vllm"):
        return

    @wraps(read)
    def get_all_weights(self: Any, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
        weights = read(self, model_config, model)
        methods = (getattr(module, "quant_method", None) for module in model.modules())
        config = next((found for method in methods if (found := getattr(method, "seedpack", None))), None)
        manifest = None if config is None else config.made_dense()
        if manifest is None or not manifest.tensors:
            return weights
        logger.warning(
            "seedpack: %d of %d packed tensors are made dense, as vLLM's layers take them no other way: %s ...",
            len(manifest.tensors), len(config.of_checkpoint.tensors), ", ".join(list(manifest.tensors)[:3]),
        )  # fmt: skip
        return dense_weights(weights, manifest, model_config.dtype)

    get_all_weights.of_vllm = read  # type: ignore[attr-defined]
    DefaultModelLoader.get_all_weights = get_all_weights
