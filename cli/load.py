"""The command `seedpack load`."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from seedpack.cli import output
from seedpack.cli.checks import check_packed


@click.command("load")
@click.argument("packed", type=click.Path(path_type=Path))
@output.fraction_option
@output.key_option
@output.max_bytes_option
@output.trust_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    packed: Path,
    fraction: float | None,
    max_bytes: int | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Load the checkpoint PACKED and report its layers, memory and time.

    A Hugging Face folder becomes a model whose layers stay packed; the tensors of a single file are rebuilt.
    """
    check_packed(packed, fraction)
    import seedpack

    output.quiet_transformers()
    started = time.perf_counter()
    if not (packed / "config.json").is_file():
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
    output.show_pairs(f"Loaded {packed}", pairs)
