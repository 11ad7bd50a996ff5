"""GPTQ as llm-compressor runs it, for a language model's decoder layers; in an environment of its own, as it pins versions.

Runs with that environment's Python: gptq.py MODEL TOKENS.safetensors OUT.safetensors BITS GROUP
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGE = "llmcompressor==0.14.0.1"


def quantised(model: Path, tokens: Any, bits: int, group: int, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights as GPTQ would store them, by name, dequantised; and what is said of them. Made once, kept in `work`."""
    from safetensors.torch import load_file, save_file

    out = work / f"gptq-{bits}-g{group}.safetensors"
    if not out.is_file():
        work.mkdir(parents=True, exist_ok=True)
        venv = work.parent / "venv"
        python = venv / "bin" / "python"
        if not python.is_file():
            print("installing llm-compressor …", flush=True)
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            packages = ["--constraint", str(Path(__file__).parents[2] / "constraints.txt"), PACKAGE]
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        save_file({"tokens": tokens}, work / "tokens.safetensors")
        command = [python, __file__, model, work / "tokens.safetensors", out, bits, group]
        subprocess.run([str(part) for part in command], check=True)
    return load_file(out), json.loads(out.with_suffix(".json").read_text())


def main(model: str, tokens: str, out: str, bits: int, group: int) -> None:
    """Asymmetric codes, float16 scales, its own defaults otherwise (order by activation, dampening 0.01)."""
    from importlib.metadata import version

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = load_file(tokens)["tokens"]
    # A range fitted by squared error where codes are few: from minimum to maximum, 2 bits are lost altogether.
    form = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
    form |= {"observer": "memoryless_mse"} if bits == 2 else {}
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": form}}, ignore=["lm_head"])
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(
        model=network, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )  # fmt: skip
    rebuilt: dict[str, torch.Tensor] = {}
    stored = weights = 0
    for name, layer in network.named_modules():
        if not isinstance(layer, torch.nn.Linear) or not hasattr(layer, "weight_scale"):
            continue
        group_of = torch.arange(layer.in_features) // group
        scale, zero = (getattr(layer, f"weight_{part}").detach().float() for part in ("scale", "zero_point"))
        codes = (layer.weight.detach() / scale[:, group_of] + zero[:, group_of]).round()
        rebuilt[f"{name}.weight"] = (codes - zero[:, group_of]) * scale.half().float()[:, group_of]
        stored += codes.numel() * bits + scale.numel() * (16 + bits)
        weights += codes.numel()
    save_file({name: value.contiguous() for name, value in rebuilt.items()}, out)
    said = {"bits": stored / weights, "seconds": time.perf_counter() - started, "version": version("llmcompressor")}
    Path(out).with_suffix(".json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:4], *(int(number) for number in sys.argv[4:6]))  # type: ignore[arg-type]
