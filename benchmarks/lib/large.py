"""Large models that are written in seconds: one random block again and again, from another place in each tensor, as a Llama."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

BLOCK = 1 << 23  # weights
STEP = 40_009  # weights between the places where tensors begin, so that no two are the same
DEVIATION = 0.02


def llama_config(hidden: int, intermediate: int, layers: int, vocabulary: int, *, tied: bool = False) -> dict[str, Any]:
    """Return a config.json."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 128, "num_key_value_heads": max(1, hidden // 1024),
        "vocab_size": vocabulary, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a Llama."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    narrow = 128 * config["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found |= {
            f"{at}.input_layernorm.weight": (hidden,), f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (hidden, hidden), f"{at}.self_attn.k_proj.weight": (narrow, hidden),
            f"{at}.self_attn.v_proj.weight": (narrow, hidden), f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (intermediate, hidden), f"{at}.mlp.up_proj.weight": (intermediate, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, intermediate),
        }  # fmt: skip
    found["model.norm.weight"] = (hidden,)
    return found if config["tie_word_embeddings"] else found | {"lm_head.weight": (config["vocab_size"], hidden)}


def write_folder(folder: Path, config: dict[str, Any], shard_bytes: int = 5_000_000_000) -> Path:
    """Write a Hugging Face folder in bfloat16, sharded, with Gaussian weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    block = bytes(torch.empty(BLOCK).normal_(0, DEVIATION, generator=_generator()).bfloat16().view(torch.uint8).numpy())
    ones = bytes(torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy())
    shards = list(_shards(shapes(config), shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for tensor, shape in shard.items():
            size = 2 * torch.Size(shape).numel()
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end, weight_map[tensor] = end + size, name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for count, shape in enumerate(shard.values(), len(weight_map) - len(shard)):
                left, piece = 2 * torch.Size(shape).numel(), block if len(shape) > 1 else ones * shape[0]
                place = 2 * count * STEP % len(piece) if len(shape) > 1 else 0
                while left:
                    left -= file.write(piece[place : place + left])
                    place = 0
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _shards(tensors: dict[str, tuple[int, ...]], shard_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in tensors.items():
        own = 2 * torch.Size(shape).numel()
        if shard and size + own > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name], size = shape, size + own
    yield shard


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
