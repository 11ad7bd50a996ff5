"""The most memory that packing, checking and unpacking take, beside the largest tensor of the model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.lib import large, report, watched
from benchmarks.lib.models import CACHE
from seedpack.units import size

CONFIG = large.llama_config(2048, 5632, 16, 64000, tied=True)
LARGEST = 64000 * 2048  # weights of the embedding
PACKED = ["--effort", "fast", "--include", "model.embed_tokens.weight", "--include", "model.layers.0.*"]
NO_ROOM = """
import seedpack.hf.language_model as opening
from seedpack.cli.main import main
opening.free_bytes = lambda: 0  # so that the model is run from the disk, as one that fills the memory is
main()
"""
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path: Path, config: dict[str, Any]) -> Path:
    """Write the same model as a GGUF file in Q8_0, with the same rows again and again."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    generator, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    rows: dict[int, Any] = {}
    for name, shape in large.shapes(config).items():
        parts = name.split(".")
        fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        stored = fixed.get(name) or f"blk.{parts[2]}.{GGUF_NAMES['.'.join(parts[3:-1])]}.weight"
        if len(shape) == 1:
            writer.add_tensor(stored, np.ones(shape, np.float32))
            continue
        if shape[1] not in rows:
            values = generator.standard_normal((1000, shape[1]), np.float32) * np.float32(large.DEVIATION)
            rows[shape[1]] = gguf.quantize(values, kind)
        writer.add_tensor(stored, np.resize(rows[shape[1]], (shape[0], rows[shape[1]].shape[1])), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_torch(path: Path, folder: Path) -> Path:
    """Write a folder's tensors as a state dict."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    torch.save(state, path)
    return path


def measure(result: report.Result) -> None:
    rows = []

    def add(label: str, command: Sequence[object], tensor_bytes: int) -> None:
        rows.append((label, *report.kept("memory", label, lambda: {"cells": cells_of(command, tensor_bytes)})["cells"]))

    def cells_of(command: Sequence[object], tensor_bytes: int) -> list[str]:
        found = watched.watch(command)
        beside = max(0, found.private_bytes - watched.bare() - tensor_bytes)
        mapped = max(0, found.peak_bytes - found.private_bytes)
        return [
            size(tensor_bytes),
            size(found.private_bytes),
            f"{beside / 1e6:.0f} MB",
            size(mapped),
            f"{found.seconds:.0f}",
        ]

    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        place = Path(name)
        folder = large.write_folder(place / "model", CONFIG, 500_000_000)
        inputs = {
            "a folder": (folder, [], 2),
            "a GGUF file": (write_gguf(place / "model.gguf", CONFIG), [], 4),
            "a `.pt` file": (write_torch(place / "model.pt", folder), [], 2),
            "a folder, `--jobs 2`: the process that leads": (folder, ["--jobs", "2"], 2),
            "a folder, `--calibration self`": (
                folder,
                ["--calibration", "self", "--calibration-tokens", "1024", "--calibration-context", "64"],
                2,
            ),
            "a folder, `--calibration self`, the model on the disk": (
                folder,
                ["--calibration", "self", "--calibration-tokens", "1024", "--calibration-context", "64"],
                2,
            ),
            "a folder, `--codec svd`": (folder, ["--codec", "svd", "--set", "rank=16"], 2),
        }
        for label, (model, options, element) in inputs.items():
            if not result.wanted(label):
                continue
            output = place / ("packed.safetensors" if model.suffix == ".pt" else "packed")
            chosen = [part for part in PACKED if "svd" not in options or part not in ("--effort", "fast")]
            compress = watched.seedpack("compress", model, "-o", output, *chosen, *options)
            if "on the disk" in label:
                compress[1:3] = ["-c", NO_ROOM]
            add(f"compress {label}", compress, element * LARGEST)
            if label == "a folder":
                add("verify", watched.seedpack("verify", output), 2 * LARGEST)
                add("unpack", watched.seedpack("unpack", output, "-o", place / "dense"), 2 * LARGEST)
                shutil.rmtree(place / "dense", ignore_errors=True)
            if output.exists():
                shutil.rmtree(output) if output.is_dir() else output.unlink()
        weights = sum(torch.Size(shape).numel() for shape in large.shapes(CONFIG).values())
    result.say(
        f"A Llama of {weights / 1e9:.2f} billion weights, {size(2 * weights)} in bfloat16. Its embedding, the largest tensor, and its "
        "first layer are packed by trellis at effort `fast`, the others are stored as they are."
    )
    result.say(
        f"Private memory is what a process has of its own at its largest. Importing torch and transformers takes {size(watched.bare())} "
        "of it; *beside* is what is left when that and the largest tensor, as it is read, are taken off."
    )
    result.say(
        "Pages of mapped files are listed apart: libraries, and of `.pt` files and packed ones what was read. The kernel drops them "
        "when it needs room."
    )
    result.table(("", "largest tensor", "private", "beside", "mapped", "s"), rows)
    result.say(
        "trellis and seedlm turn a few rows at a time into floats. svd, basis and mask work on all of a matrix in float32, twice "
        "a tensor in bfloat16. A calibration runs the model in float32, in memory where that takes less than half of what is free; else from the disk, a layer at a time. "
        "Then a layer's Hessian is factored in float64, which takes 40 bytes for each pair of its input channels: 1.27 GB for the 5,632 here."
    )


if __name__ == "__main__":
    report.run("memory", "Memory beside the largest tensor", measure)
