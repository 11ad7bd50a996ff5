"""GGUF files of small models of many architectures, with random values in the layout of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils as legacy

from tests.helpers.models import SMALL

ROUTED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}  # what a file does not tell has its default
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {  # by the architecture that a file names
    "llama": ("LlamaConfig", {**SMALL, **ROUTED}),
    "qwen2": ("Qwen2Config", {**SMALL, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {**SMALL, "num_key_value_heads": 2, "head_dim": 128}),
    "qwen2moe": ("Qwen2MoeConfig", {**SMALL, **EXPERTS, "num_key_value_heads": 2}),
    "qwen3moe": ("Qwen3MoeConfig", {**SMALL, **ROUTED, **EXPERTS}),
    "falcon": ("FalconConfig", {**SMALL, "num_kv_heads": 1, "new_decoder_architecture": False, "multi_query": True}),
    "phi3": ("Phi3Config", {**SMALL, "num_key_value_heads": 2, "vocab_size": 32064}),
    "bloom": ("BloomConfig", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "stablelm": ("StableLmConfig", {**SMALL, "num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024, "n_ctx": 1024}),
    "starcoder2": ("Starcoder2Config", {**SMALL, "num_key_value_heads": 2}),
    "mamba": ("MambaConfig", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "expand": 2}),
    "nemotron": ("NemotronConfig", {**SMALL, "num_key_value_heads": 2}),
    "gemma2": ("Gemma2Config", {**SMALL, **ROUTED}),
    "gemma3": ("Gemma3TextConfig", {**SMALL, **ROUTED}),
    "minimax-m2": ("MiniMaxM2Config", {**SMALL, **ROUTED, "num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
TRANSPOSED = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")  # of GPT-2
OWN_NAMES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "minimax-m2": "minimax_m2"}
QUANTISED = ("Q8_0", "Q4_0", "F16", "BF16")


def write_model(
    path: Path, architecture: str, kinds: tuple[str, ...] = ("F32",), head: str = "", **changes: Any
) -> Path:
    """A file of one architecture, its matrices of some types by turns, the rest in F32; with a head of the values of the
    embedding ("same") or of others ("other")."""
    name, options = CONFIGS[architecture]
    config = getattr(transformers, name)(**{**options, **changes})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(str(path), architecture)
    fields: Any = legacy.GGUF_TO_TRANSFORMERS_MAPPING["config"]
    for key, own in fields[OWN_NAMES.get(architecture, architecture)].items():
        if own is not None and own != -1 and (value := getattr(config, own, None)) is not None:
            _add(writer, f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{index}>" for index in range(96)])
    generator, count = np.random.default_rng(0), 0
    for stored, shape in _forms(architecture, model).items():
        values = generator.standard_normal(shape, np.float32)
        kind = gguf.GGMLQuantizationType.F32
        if len(shape) > 1 and shape[-1] % 32 == 0:
            kind, count = gguf.GGMLQuantizationType[kinds[count % len(kinds)]], count + 1
        if stored.endswith("ssm_a"):
            values = -np.abs(values)
        writer.add_tensor(stored, *_stored(values, kind))
        if head and stored == "token_embd.weight":
            writer.add_tensor("output.weight", *_stored(values if head == "same" else -values, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(values: Any, kind: Any) -> tuple[Any, ...]:
    """What the writer takes: an array, its shape if it has no dtype of its own, and its type."""
    if kind.name in ("Q4_K", "Q6_K"):  # gguf does not quantise to these: random blocks with scales that are finite
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.random.default_rng(1).integers(0, 256, (values.size // block, size), np.uint8)
        scales = {"Q4_K": slice(0, 4), "Q6_K": slice(208, 210)}[kind.name]
        data[:, scales] = np.full((len(data), (scales.stop - scales.start) // 2), 0.01, np.float16).view(np.uint8)
        return data.reshape(*values.shape[:-1], -1), None, kind
    data = gguf.quantize(values, kind)
    return (data, None, kind) if data.dtype == np.uint8 else (data,)


def _forms(architecture: str, model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, as transformers' processors expect them."""
    processor = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)(config={})
    names = legacy.get_gguf_hf_weights_map(model, processor)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = model.all_tied_weights_keys
    forms = {}
    for stored, own in names.items():
        if own in tied or own not in shapes:
            continue
        shape = shapes[own]
        if "gate_exps" in stored or "up_exps" in stored:
            shape = (shape[0], shape[1] // 2, shape[2])
        if architecture == "gpt2" and stored.endswith(TRANSPOSED):
            shape = shape[::-1]
        if "conv1d.weight" in stored:
            shape = (shape[0], shape[2])
        if "gate_inp_shexp" in stored:
            shape = shape[1:]
        forms[stored + (".weight" if "_exps" in stored and not stored.endswith((".weight", ".bias")) else "")] = shape
    return forms


def _add(writer: Any, key: str, value: Any) -> None:
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array,
    }  # fmt: skip
    adders[type(value)](key, value)
