"""Read what config.json says of weights that are quantised already, and take it out: at its top, and in any part of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seedpack.dtypes import PACKABLE, SPELLINGS
from seedpack.errors import ModelError

KEYS = ("quantization_config", "compression_config")
READ = ("fp8", "mxfp4", "compressed-tensors", "modelopt", "fbgemm_fp8")  # where the tensors tell the rest
FILES = frozenset(
    {"hf_quant_config.json", "quantize_config.json", "quant_config.json"}
)  # that say the same as the config


def quantizations(config: object) -> list[Any]:
    """Return what a config, or a part of it such as `text_config`, says of quantised weights; None is nothing."""
    return list(_found(config))


def _found(config: object) -> Iterator[Any]:
    for key, value in config.items() if isinstance(config, dict) else ():
        if key in KEYS:
            if value is not None:
                yield value
        else:
            yield from _found(value)


def without_quantization(config: Any) -> Any:
    """Return a config without what it and its parts say of quantised weights."""
    if not isinstance(config, dict):
        return config
    return {key: without_quantization(value) for key, value in config.items() if key not in KEYS}


def strip_quantization(config: Any) -> None:
    """Take it out of a config of transformers and its parts, in place."""
    from transformers import PreTrainedConfig

    for key in KEYS:
        if key in vars(config):
            delattr(config, key)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            strip_quantization(part)


def require_read(documents: list[Any], where: Path) -> None:
    """Refuse methods that are not read.

    Raises:
        ModelError: naming the method.
    """
    for document in documents:
        method = document.get("quant_method", "?") if isinstance(document, dict) else document
        if method not in READ:
            raise ModelError(
                f"{where}: is quantised already (by {method}); start from the dense model, or from one in float8, int8 or "
                f"MXFP4 (by {', '.join(READ)})"
            )


def block_sizes(documents: list[Any]) -> list[tuple[int, ...]]:
    """Return the sizes of the blocks that have a scale each, where they are named."""
    sizes = []
    for document in (document for document in documents if isinstance(document, dict)):
        groups = document.get("config_groups")
        groups = list(groups.values()) if isinstance(groups, dict) else []
        weights = [group.get("weights") for group in groups if isinstance(group, dict)]
        structures = [scheme.get("block_structure") for scheme in weights if isinstance(scheme, dict)]
        sizes += [document.get("weight_block_size"), *structures]
    return [tuple(size) for size in sizes if isinstance(size, list) and _is_block(size)]


def _is_block(size: list[Any]) -> bool:
    return len(size) == 2 and all(type(n) is int and n > 0 for n in size)


def dense_dtype(config: dict[str, Any]) -> str:
    """Return the safetensors name of the dtype that a config names for its model, BF16 where it names none.

    >>> dense_dtype({"text_config": {"torch_dtype": "float16"}}), dense_dtype({})
    ('F16', 'BF16')
    """
    for holder in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            name = holder.get(key) if isinstance(holder, dict) else None
            code = SPELLINGS.get(name.removeprefix("torch."), "") if isinstance(name, str) else ""
            if code in PACKABLE:
                return code
    return "BF16"
