"""The command `seedpack load`."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from seedpack.cli import output
from seedpack.errors import ModelError


@click.command("load")
@click.argument("packed", type=click.Path(path_type=Path))
@click.option("--prompt", help="Generate text from this prompt, greedily.")
@click.option(
    "--max-new-tokens", default=40, show_default=True, type=click.IntRange(1), help="Generate at most this many tokens."
)
@output.fraction_option
@output.key_option
@output.max_bytes_option
@output.trust_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    packed: Path,
    prompt: str | None,
    max_new_tokens: int,
    fraction: float | None,
    max_bytes: int | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Load the checkpoint PACKED and report its layers, memory and time.

    A Hugging Face folder becomes a model whose layers stay packed; the tensors of a single file are rebuilt.
    """
    import seedpack
    from seedpack.converter.trust import trusting_remote_code

    output.quiet_transformers()
    started = time.perf_counter()
    if prompt is not None and not prompt.strip():
        raise click.UsageError("--prompt is empty")
    if not (packed / "config.json").is_file():
        if prompt is not None:
            raise click.UsageError("--prompt needs a Hugging Face folder with a tokenizer")
        state = seedpack.load(packed, dense=True, fraction=fraction, max_bytes=max_bytes)
        report = {
            "tensors": len(state),
            "dense_bytes": sum({t.data_ptr(): t.nbytes for t in state.values()}.values()),
            "seconds": time.perf_counter() - started,
        }
        _show(packed, report, as_json)
        return
    trusted: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    model = seedpack.load(packed, fraction=fraction, max_bytes=max_bytes, **trusted)
    report = {
        "architecture": type(model).__name__,
        "layers": dict(_layers(model)),
        "memory_bytes": model.get_memory_footprint(),
        "dense_bytes": _dense_bytes(model),
        "seconds": time.perf_counter() - started,
    }
    if prompt is not None:
        with trusting_remote_code(trust_remote_code):
            report |= _generate(packed, model, prompt, max_new_tokens)
    _show(packed, report, as_json)


def _layers(model: Any) -> Counter[str]:
    from seedpack.loader.layers import PackedModule

    names = (type(m).__name__ for m in model.modules())
    packed = {type(m).__name__ for m in model.modules() if isinstance(m, PackedModule)}
    return Counter(name for name in names if name in packed or name.endswith("Experts"))


def _dense_bytes(model: Any) -> int:
    """Return the size of the same model unpacked."""
    import math

    element = model.dtype.itemsize
    manifest = model.hf_quantizer.quantization_config.manifest
    packed = sum(math.prod(entry.shape) for entry in manifest.tensors.values())
    rest = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    return int((packed + rest) * element)


def _generate(packed: Path, model: Any, prompt: str, max_new_tokens: int) -> dict[str, Any]:
    import torch

    from seedpack.hf.language_model import tokenizer_of

    if not model.can_generate():
        raise click.UsageError(f"--prompt: a {type(model).__name__} does not generate text")
    if (tokenizer := tokenizer_of(packed)) is None:
        raise ModelError(f"{packed}: no tokenizer that transformers can load; --prompt needs one")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )[0]
    seconds = time.perf_counter() - started
    count = len(ids) - inputs["input_ids"].shape[1]
    return {
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "new_tokens": count,
        "tokens_per_second": count / seconds,
    }


def _show(packed: Path, report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.show_json(report)
        return
    pairs = []
    if "architecture" in report:
        layers = ", ".join(f"{count} {name}" for name, count in report["layers"].items())
        pairs += [
            ("architecture", report["architecture"]),
            ("packed layers", layers),
            ("memory", f"{output.size(report['memory_bytes'])}, dense {output.size(report['dense_bytes'])}"),
        ]
    else:
        pairs.append(("tensors", f"{report['tensors']}, {output.size(report['dense_bytes'])} when dense"))
    pairs.append(("time", output.duration(report["seconds"])))
    if "text" in report:
        pairs.append(("generated", f"{report['new_tokens']} tokens, {report['tokens_per_second']:.1f} per second"))
    output.show_pairs(f"Loaded {packed}", pairs)
    if "text" in report:
        output.echo(report["text"], lines=True)
