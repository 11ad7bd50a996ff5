"""vLLM's loader of safetensors, which has to decode what stays dense."""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from typing import Any

from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from seedpack.vllm.dense import dense_weights

logger = init_logger(__name__)


def decode_what_stays_dense() -> None:
    """Have vLLM's loader of safetensors decode the tensors that its layers take no other way; asked once or again."""
    read = DefaultModelLoader.get_all_weights
    if hasattr(read, "of_vllm"):
        return

    @wraps(read)
    def get_all_weights(self: Any, model_config: Any, model: Any) -> Iterable[tuple[str, Tensor]]:
        weights: Iterable[tuple[str, Tensor]] = read(self, model_config, model)
        methods = (getattr(module, "quant_method", None) for module in model.modules())
        config = next((found for method in methods if (found := getattr(method, "seedpack", None))), None)
        if config is None or not (manifest := config.made_dense()).tensors:
            return weights
        logger.warning(
            "seedpack: %d of %d packed tensors are made dense, as vLLM's layers take them no other way: %s ...",
            len(manifest.tensors), len(config.of_checkpoint.tensors), ", ".join(list(manifest.tensors)[:3]),
        )  # fmt: skip
        return dense_weights(weights, manifest, model_config.dtype)

    get_all_weights.of_vllm = read  # type: ignore[attr-defined]
    DefaultModelLoader.get_all_weights = get_all_weights
