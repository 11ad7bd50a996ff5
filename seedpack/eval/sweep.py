"""A frontier: the loss of a model at each of several bits per weight. It goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seedpack.converter.journal import write_file
from seedpack.converter.options import CompressOptions, Progress, silent
from seedpack.converter.pipeline import compress
from seedpack.errors import ModelError, OptionError, OutputError
from seedpack.eval.embeddings import EmbeddingReport
from seedpack.eval.evaluate import Evaluation, evaluate_each

FILE = "sweep.json"


def sweep(
    model: str | Path,
    output: str | Path,
    bits: Sequence[float],
    data: Sequence[str | Path],
    options: CompressOptions | None = None,
    *,
    context: int = 1024,
    tokens: int = 16384,
    progress: Progress = silent,
    **changes: Any,
) -> list[Evaluation]:
    """Pack a model at several bits per weight, and compare each with the original; what is done already is kept.

    Args:
        model: a Hugging Face folder, a hub id, or the GGUF file of a language model.
        output: a folder for the packed models, and for what is measured of them; an existing one of the same sweep goes on.
        bits: per weight; they may be fractions.
        data: texts, or folders of images (see `evaluate`).
        options: of `compress`, without bits.
        context: see `evaluate`.
        tokens: see `evaluate`.
        progress: called as work is done.
        changes: options by name.

    Returns:
        For each of the data an evaluation of all that was packed, by bits.

    Raises:
        OptionError: no bits, or some twice.
        OutputError: the folder is of another model, or of other options.
    """
    if not bits or len(set(bits)) < len(bits):
        raise OptionError(f"bits must be some numbers, each once, got {', '.join(f'{b:g}' for b in bits) or 'none'}")
    folder, chosen = Path(output), CompressOptions.of(options, changes)
    about = {"model": str(model), "data": [_digest(Path(path)) for path in data], "context": context, "tokens": tokens,
             "options": _plain(chosen)}  # fmt: skip
    known = _known(folder, about)
    for done, b in enumerate(sorted(bits), 1):
        progress("Sweeping", 0, 0, "", f"{b:g} bits per weight, {done} of {len(bits)}")
        packed = folder / f"{b:g}-bits"
        if not packed.exists():
            compress(model, packed, CompressOptions.of(chosen, {"bits": b}), progress=progress)
        if str(b) not in known:
            found = evaluate_each(model, [packed], data, context=context, tokens=tokens, progress=progress)
            known[str(b)] = [evaluation.to_json() for evaluation in found]
            text = json.dumps({"about": about, "points": known}, indent=1)
            write_file(folder / FILE, lambda path, text=text: path.write_text(text))  # type: ignore[misc]
    points = [[Evaluation.from_json(document) for document in known[str(b)]] for b in sorted(bits)]
    return [replace(of_text[0], packed=tuple(e.packed[0] for e in of_text)) for of_text in zip(*points, strict=True)]


def _known(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured before."""
    path = folder / FILE
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise OutputError(f"{folder}: exists already, and is no sweep; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda partial: partial.write_text(json.dumps({"about": about, "points": {}}, indent=1)))
        return {}
    try:
        document = json.loads(path.read_text())
        before, points = document["about"], document["points"]
        assert isinstance(before, dict) and isinstance(points, dict)
    except Exception as error:
        raise OutputError(f"{path}: cannot be read ({type(error).__name__}); remove it to measure again") from None
    if before != json.loads(json.dumps(about)):
        odd = next(key for key in about if before.get(key) != json.loads(json.dumps(about[key])))
        raise OutputError(f"{folder}: was made with another {odd} ({before.get(odd)}); name another folder")
    return points


def _plain(options: CompressOptions) -> dict[str, str]:
    """Return what of some options differs from the defaults, as text."""
    defaults = vars(CompressOptions())
    return {
        name: repr(value)
        for name, value in vars(options).items()
        if name not in ("jobs", "key") and value != defaults[name]
    }


def _digest(path: Path) -> str:
    """Return the digest of a text, or the name of a folder of images."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(path)


def plot(found: Sequence[Evaluation], path: Path) -> None:
    """Draw what is lost by bits per weight, a line for each text with its 95% confidence interval.

    Args:
        found: of `sweep`.
        path: of the picture.

    Raises:
        ModelError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ModelError("it needs matplotlib; pip install matplotlib") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for evaluation in found:
        bits = [size.bits_per_weight or 0.0 for size, _ in evaluation.packed]
        reports = [report for _, report in evaluation.packed]
        values = [r.distance_mean if isinstance(r, EmbeddingReport) else r.kl_mean for r in reports]
        axes.plot(bits, values, "o-", label=Path(evaluation.data).name)
        intervals = [getattr(r, "kl_interval", None) or (v, v) for r, v in zip(reports, values, strict=True)]
        axes.fill_between(bits, [low for low, _ in intervals], [high for _, high in intervals], alpha=0.2)
    is_cosine = isinstance(found[0].packed[0][1], EmbeddingReport)
    lost = "1 - cosine to the original's embedding" if is_cosine else "KL divergence from the original, nats"
    axes.set(xlabel="bits per weight, all of the file counted", ylabel=lost, yscale="log")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
