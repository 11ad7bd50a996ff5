"""The model card of a packed folder, written from what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seedpack._version import __version__
from seedpack.codecs.registry import codec_from_spec
from seedpack.converter.journal import write_file
from seedpack.errors import ModelError
from seedpack.formats import Checkpoint
from seedpack.formats.record import file_digest, verify_record, write_record
from seedpack.hf.folder import read_config
from seedpack.loader.layers import codec_matrix
from seedpack.units import size

CARD = "README.md"
ORIGINAL = "<!-- the original model's card -->"
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")  # of the original's card
REPO = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    folder: str | Path, evaluations: Sequence[Any] = (), *, base_model: str | None = None, command: str | None = None
) -> str:
    """Write a packed folder's README.md, anew in the record of the folder's files, and return it.

    The original's own card, where the folder has it, stays below; its licence and language are carried over.

    Args:
        folder: as `compress` writes it.
        evaluations: of `seedpack.eval`, in which this folder is one of the packed models.
        base_model: the hub id of the original; default that in the card that is there.
        command: that has made the folder.

    Raises:
        ModelError: it is no packed folder, or has files that its record does not know.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: is no folder of a packed Hugging Face model; a card describes one")
    require_recorded(path)
    known, original = _old_card(path)
    base = base_model or known.get("base_model")
    data = {key: known[key] for key in KEPT if known.get(key) is not None}
    tags = [tag for tag in known.get("tags") or [] if isinstance(tag, str)]
    with Checkpoint(path) as checkpoint:
        facts = _facts(path, checkpoint)
    bits = read_config(path).get("quantization_config", {}).get("bits")
    data |= {
        "library_name": "transformers",
        "tags": list(dict.fromkeys([*tags, "seedpack", *([f"{bits}-bit"] if bits else [])])),
    }
    if base is not None:
        data |= {"base_model": base, "base_model_relation": "quantized"}
    measured = measured_of(path, evaluations)
    data |= _model_index(path.resolve().name, measured)
    text = (
        _front(data) + _body(path, facts, base, measured, command) + (f"\n{ORIGINAL}\n\n{original}" if original else "")
    )
    write_file(path / CARD, lambda partial: partial.write_text(text, "utf-8"))
    write_record(path)
    return text


def measured_of(path: Path, evaluations: Sequence[Any]) -> list[Any]:
    """Return the evaluations of a folder, each with its size and report."""
    return [(e, s, r) for e in evaluations for s, r in e.packed if Path(s.path).resolve() == path.resolve()]


def require_recorded(path: Path) -> None:
    """Refuse a folder whose record would be written over files that were changed."""
    for name, error in verify_record(path):
        if error is not None and name != CARD:
            raise error


def _old_card(path: Path) -> tuple[dict[str, Any], str]:
    """Return the data at the head of the card that is there, and the text of the original's."""
    from huggingface_hub import ModelCard

    if not (path / CARD).is_file():
        return {}, ""
    text = (path / CARD).read_text("utf-8", "replace")
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
        data: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # of YAML: a card that cannot be read is text
        return {}, text
    _, marked, original = text.partition(ORIGINAL)
    if marked:
        return data, original.strip() + "\n"
    if "seedpack" in (data.get("tags") or []):
        return data, ""
    return data, card.text.strip() + "\n"


def _facts(path: Path, checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Return what is known of a packed folder without running it."""
    manifest = checkpoint.manifest
    stored = packed = weights = 0.0
    rates: dict[str, float] = {}
    for name, entry in manifest.tensors.items():
        matrix = codec_matrix(entry.shape, entry.transposed) if manifest.is_packed(name) else entry.shape
        count = 1.0
        for length in entry.shape:
            count *= length
        weights += count
        if manifest.is_packed(name):
            codec = codec_from_spec(manifest.codec_of(name))
            bits = codec.bits_per_weight(matrix)
            stored, packed = stored + bits * count, packed + count
            label = f"{codec.id}, {codec.code_bits} bits" if hasattr(codec, "code_bits") else codec.id
            rates[label] = rates.get(label, 0.0) + count
    files = [file for file in path.glob("*.safetensors") if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    method = ", ".join(
        f"{label} ({count / max(1.0, packed):.0%})" for label, count in sorted(rates.items(), key=lambda r: -r[1])
    )
    return [
        ("method", method or "none packed"),
        ("bits per weight", f"{stored / max(1.0, packed):.3f} over the packed weights, {8 * total / max(1.0, weights):.3f} of all in the files"),
        ("weights", f"{weights:,.0f}, {packed / max(1.0, weights):.1%} packed"),
        ("size of the weights", f"{size(total)} ({total:,} bytes)"),
        ("written by", manifest.writer),
        *((f"SHA-256 of `{file.name}`", f"`{file_digest(file)}`") for file in sorted(files)),
    ]  # fmt: skip


def _front(data: dict[str, Any]) -> str:
    import yaml

    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n"


def _body(path: Path, facts: list[tuple[str, str]], base: str | None, measured: list[Any], command: str | None) -> str:
    name = path.resolve().name
    of = f"[{base}](https://huggingface.co/{base})" if base and REPO.fullmatch(base) else base or "a model"
    lines = [f"\n# {name}\n", f"{of}, packed by [seedpack](https://pypi.org/project/seedpack-torch/): seeds and coefficients from which the weights are made again, inside each product.\n"]  # fmt: skip
    lines += ["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in facts)]
    if measured:
        lines += ["\n## Quality\n", *_quality(measured)]
    loads = "AutoModelForCausalLM" if _writes(path) else "AutoModel"
    lines += [
        "\n## Use\n", "```console", "pip install seedpack-torch transformers", "```\n", "```python",
        f"from transformers import {loads}\n", f'model = {loads}.from_pretrained("{name}")', "```\n",
        "`seedpack verify` checks every byte of the folder, `seedpack unpack` makes the dense model; `vllm serve` takes it as it is.",
    ]  # fmt: skip
    if command:
        lines += ["\n## Made by\n", "```console", command, "```"]
    lines += [f"\nThis card is of seedpack {__version__}."]
    return "\n".join(lines) + "\n"


def _quality(measured: list[Any]) -> list[str]:
    """Return a table for each text, with 95% confidence intervals."""
    lines: list[str] = []
    for evaluation, _, report in measured:
        found = asdict(report)
        lines += [f"{evaluation.task} on {Path(evaluation.data).name}: {evaluation.inputs}.\n", "| | original | packed | 95% |", "|---|---|---|---|"]  # fmt: skip
        for label, before, after, interval in MEASURES:
            if after in found and found[after] is not None:
                given = found.get(interval)
                cells = (
                    f"{found[before]:.4g}" if before in found and found[before] is not None else "",
                    f"{found[after]:.4g}",
                    "" if given is None else f"{given[0]:.4g} to {given[1]:.4g}",
                )
                lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    return lines


MEASURES = (  # how a measure is called, its names for the original and the packed model, and that of its interval
    ("perplexity", "perplexity_original", "perplexity_packed", "perplexity_interval"),
    ("KL divergence from the original, nats", "", "kl_mean", "kl_interval"),
    ("its 99th percentile", "", "kl_p99", ""),
    ("the same likeliest token", "", "top1_agreement", "top1_interval"),
    ("the same class", "", "agreement", ""),
    ("accuracy", "accuracy_original", "accuracy_packed", ""),
    ("1 - cosine of embeddings", "", "distance_mean", ""),
    ("the same nearest neighbour", "", "nearest_agreement", ""),
)


def _model_index(name: str, measured: list[Any]) -> dict[str, Any]:
    """Return the measures as the hub has them in a card's head."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = []
    for evaluation, _, report in measured:
        found, text = asdict(report), Path(evaluation.data).name
        for label, _, measure, _ in MEASURES:
            if found.get(measure) is not None:
                results.append(
                    EvalResult(
                        task_type="text-generation" if evaluation.task == "language-modeling" else evaluation.task,
                        dataset_type=text,
                        dataset_name=text,
                        metric_type=measure,
                        metric_name=label,
                        metric_value=found[measure],
                    )
                )
    return {"model-index": eval_results_to_model_index(name, results)} if results else {}


def _writes(path: Path) -> bool:
    return any(
        str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in read_config(path).get("architectures") or []
    )
