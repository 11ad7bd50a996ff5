"""llama.cpp as its users run it (the wheel `xllamacpp`), and GGUF files for it, of real and of random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib import models

RUN = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 512, 1, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[2])
params.cache_ram_mib, params.n_gpu_layers = 0, 0
server, best = xllamacpp.Server(params), None
prompt, new = int(sys.argv[3]), int(sys.argv[4])
for turn in range(3):
    asked = {"prompt": [(7 * i + 50 * turn) % 1000 + 300 for i in range(prompt)], "n_predict": new, "ignore_eos": True,
             "cache_prompt": False, "temperature": 0.0}
    found = server.handle_completions(asked)
    found = (json.loads(found) if isinstance(found, (str, bytes)) else found)["timings"]
    now = {"decode": found["predicted_per_second"], "prompt": found["prompt_per_second"]}
    best = now if best is None else {key: max(best[key], now[key]) for key in now}
print("FOUND " + json.dumps(best), flush=True)
"""

_HEAD = {"Q4_0": "Q6_K", "Q4_K_M": "Q6_K", "IQ4_XS": "Q6_K"}  # the type of a tied head in llama.cpp's mixes


def speed(path: Path, threads: int, prompt: int, new: int) -> dict[str, float]:
    """Return tokens per second of decoding and of prompt processing, the best of three."""
    command = [sys.executable, "-c", RUN, str(path), str(threads), str(prompt), str(new)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))  # type: ignore[no-any-return]


def smollm2(kind: str) -> Path:
    """SmolLM2-135M with its linear layers in a type of blocks of 32, and the embedding as shipped, in Q8_0."""
    import gguf

    target = models.CACHE / f"smollm2-135m-{kind}.gguf"
    if target.is_file():
        return target
    reader = gguf.GGUFReader(models.smollm2_gguf())
    writer = _writer(target, reader, {})
    for tensor in reader.tensors:
        if tensor.tensor_type.name != "Q4_1":
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        quantised = getattr(gguf.GGMLQuantizationType, kind)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
    return _write(writer, target)


def llama(config: Any, mix: str) -> Path:
    """A model of a LlamaConfig's shape with random blocks, in the types that one of llama.cpp's mixes takes: as fast as real ones."""
    import gguf

    target = models.CACHE / f"llama-{config.hidden_size}x{config.num_hidden_layers}-{mix}.gguf"
    if target.is_file():
        return target
    reader, random = gguf.GGUFReader(models.smollm2_gguf()), np.random.default_rng(0)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.hidden_size // heads
    writer = _writer(
        target, reader,
        {"llama.block_count": config.num_hidden_layers, "llama.embedding_length": hidden, "llama.rope.dimension_count": size,
         "llama.feed_forward_length": inner, "llama.attention.head_count": heads, "llama.attention.head_count_kv": kv_heads,
         "llama.vocab_size": config.vocab_size},
    )  # fmt: skip

    def add(name: str, rows: int, columns: int, kind: str) -> None:
        quantised = getattr(gguf.GGMLQuantizationType, kind)
        block, octets = gguf.GGML_QUANT_SIZES[quantised]
        data = random.integers(0, 256, (rows, columns // block, octets), dtype=np.uint8)
        scale = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
        for place in {"Q4_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}[kind]:
            data[:, :, place : place + 2] = scale
        writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=quantised)

    plain = {"Q4_K_M": "Q4_K"}.get(mix, mix)
    add("token_embd.weight", config.vocab_size, hidden, _HEAD[mix])
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    layers = config.num_hidden_layers
    for i in range(layers):
        more = mix == "Q4_K_M" and (i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2)
        better = "Q6_K" if more else plain
        for name, rows, columns, kind in (
            ("attn_q", hidden, hidden, plain), ("attn_k", kv_heads * size, hidden, plain),
            ("attn_v", kv_heads * size, hidden, better), ("attn_output", hidden, hidden, plain),
            ("ffn_gate", inner, hidden, plain), ("ffn_up", inner, hidden, plain), ("ffn_down", hidden, inner, better),
        ):  # fmt: skip
            add(f"blk.{i}.{name}.weight", rows, columns, kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(hidden, np.float32))
    return _write(writer, target)


def _writer(target: Path, reader: Any, changed: dict[str, int]) -> Any:
    """Return a writer with the fields of another file, some of them changed; more tokens are added where the vocabulary is larger."""
    import gguf

    writer = gguf.GGUFWriter(target.with_suffix(".partial"), "llama")
    vocabulary = changed.get("llama.vocab_size", 0)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = field.contents()
        if name == "tokenizer.ggml.tokens":
            value = [*value, *(f"<|more_{i}|>" for i in range(len(value), vocabulary))]
        elif name in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
            value = [*value, *[value[-1]] * (vocabulary - len(value))]
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, changed.get(name, value), field.types[0], sub_type=inner)
    return writer


def _write(writer: Any, target: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target.with_suffix(".partial").replace(target)
