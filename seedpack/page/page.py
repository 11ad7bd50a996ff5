"""The page of a packed model: from its files, and where they are given from its original and a text."""

from __future__ import annotations

import html
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from seedpack._version import WRITER
from seedpack.converter.options import Progress, silent
from seedpack.converter.report import decibels
from seedpack.errors import ModelError
from seedpack.eval.evaluate import compare_loaded
from seedpack.eval.tensors import TensorComparison, compare_tensors
from seedpack.formats import Checkpoint
from seedpack.formats.listing import StoredTensor, list_packed
from seedpack.formats.staging import staged
from seedpack.hf.tasks import LANGUAGE, load_for_task, load_processor, task_of
from seedpack.page.charts import bars, grid, lines
from seedpack.units import size

LISTED, LINES, WRITTEN = 40, 6, 48  # tensors of the worst; spectra in one chart; tokens that are written
DEPTH = re.compile(r"\.(\d+)\.")


def write_page(
    packed: str | Path,
    output: str | Path,
    original: str | Path | None = None,
    *,
    text: str | Path | None = None,
    context: int = 1024,
    tokens: int = 4096,
    force: bool = False,
    progress: Progress = silent,
) -> None:
    """Write a page of a packed model.

    Args:
        packed: a file or folder as `compress` writes it.
        output: the page, which ends in .html.
        original: the model before it was packed, for errors and spectra.
        text: a file, for what a language model loses at each position, and what both write; needs the original.
        context: tokens per window of the text.
        tokens: of the text to use.
        force: replace an existing page.
        progress: called as work is done.

    Raises:
        ModelError: a text without the original, or models that do not belong together.
        OutputError: the output exists.
    """
    packed, output = Path(packed), Path(output)
    if output.suffix != ".html":
        raise ModelError(f"{output}: a page is a file that ends in .html")
    if text is not None and original is None:
        raise ModelError("a text is for comparing: name the original too")
    with staged(output, force=force) as partial:
        with Checkpoint(packed) as checkpoint:
            writer, stored = checkpoint.manifest.writer, list_packed(checkpoint).tensors
        sections = [_summary(packed, writer, stored), _sizes(stored), _allocation(stored)]
        if original is None:
            sections.append(_note("Errors and spectra are shown where the original is named too."))
        else:
            sections += _errors(packed, original, stored, progress)
        if text is not None and original is not None:
            sections += _quality(packed, original, Path(text), context, tokens, progress)
        elif original is not None:
            sections.append(
                _note("What a language model loses by position, and writes, is shown where a text is given.")
            )
        sections.append(_tensors(stored))
        sections.append(_note(f"Written by {WRITER}. The page loads nothing."))
        template = Template((files("seedpack.page") / "template.html").read_text("utf-8"))
        name = _plain(packed.resolve().name)
        page = template.substitute(title=name, body=f"<h1>{name}</h1>\n" + "\n".join(sections))
        partial.write_text(page, "utf-8")


def _summary(path: Path, writer: str, stored: Sequence[StoredTensor]) -> str:
    packed = [tensor for tensor in stored if tensor.codec]
    weights, all_weights = (sum(tensor.weights for tensor in found) for found in (packed, stored))
    total = sum(tensor.nbytes for tensor in stored)
    facts = {
        "size": size(total),
        "bits per weight": f"{8 * total / max(1, all_weights):.3f}",
        "bits per packed weight": f"{8 * sum(t.nbytes for t in packed) / max(1, weights):.3f}",
        "weights": f"{all_weights:,}",
        "packed": f"{weights / max(1, all_weights):.1%} in {len(packed)} of {len(stored)} tensors",
        "written by": writer,
    }
    return "<dl>" + "".join(f"<div><dt>{k}</dt><dd>{_plain(v)}</dd></div>" for k, v in facts.items()) + "</dl>"


def _sizes(stored: Sequence[StoredTensor]) -> str:
    """Return the bytes of each kind of layer."""
    by_role: dict[str, float] = defaultdict(float)
    for tensor in stored:
        by_role[_plain(_role(tensor.name))] += tensor.nbytes / 1e6
    most = dict(sorted(by_role.items(), key=lambda item: -item[1])[:14])
    return _section("Size by layer", bars(most, " MB"))


def _allocation(stored: Sequence[StoredTensor]) -> str:
    """Return the bits of each tensor by layer and depth, and of those outside of layers."""
    packed = [tensor for tensor in stored if tensor.codec]
    if not packed:
        return ""
    return _section("Bits per weight, by layer and depth", _by_depth(packed, lambda t: t.bits_per_weight, ""))


def _by_depth(tensors: Sequence[Any], value: Callable[[Any], float], unit: str) -> str:
    inside: dict[str, dict[int, float]] = defaultdict(dict)
    outside: dict[str, float] = {}
    for tensor in tensors:
        if found := DEPTH.search(tensor.name):
            inside[_plain(_role(tensor.name))][int(found[1])] = value(tensor)
        else:
            outside[_plain(tensor.name)] = value(tensor)
    listed = "".join(f"<li>{name}: {value:.3f}{unit}</li>" for name, value in outside.items())
    return (grid(inside, unit) if inside else "") + (f"<ul>{listed}</ul>" if listed else "")


def _errors(packed: Path, original: str | Path, stored: Sequence[StoredTensor], progress: Progress) -> list[str]:
    """Return maps of errors, spectra, and the worst tensors."""
    _, count, comparisons = compare_tensors(original, packed)
    found: list[TensorComparison] = []
    for comparison in comparisons:
        progress("Comparing tensors", 1, count, "tensors", comparison.name)
        found.append(comparison)
    changed = [c for c in found if c.error > 0 and c.energy > 0]
    if not changed:
        return [_note("No tensor differs from the original's.")]

    def loss(c: TensorComparison) -> float:
        return decibels(c.error, c.energy)

    sections = [_section("Relative error, by layer and depth", _by_depth(changed, loss, " dB"))]
    kinds = {tensor.name: tensor for tensor in stored}
    rows = []
    for c in sorted(changed, key=loss, reverse=True)[:LISTED]:
        bits = kinds[c.name].bits_per_weight if c.name in kinds else math.nan
        ranks = [math.nan if rank is None else rank for rank in (c.rank_a, c.rank_b)]
        rows.append([c.name, "×".join(map(str, c.shape)), bits, loss(c), c.error, *ranks])
    columns = ["tensor", "shape", "bits", "error, dB", "error, squared", "effective rank", "packed"]
    sections.append(_section(f"The worst {len(rows)} of {len(changed)} tensors that differ", _table(columns, rows)))
    by_role: dict[str, list[TensorComparison]] = defaultdict(list)
    for c in found:
        if c.spectrum is not None:
            by_role[_role(c.name)].append(c)
    most = sorted(by_role.items(), key=lambda item: -sum(math.prod(c.shape) for c in item[1]))[:LINES]
    series = {}
    for role, members in most:
        spectra = [c.spectrum for c in members if c.spectrum is not None]
        means = [sum(values) / len(values) for values in zip(*spectra, strict=True)]
        series[_plain(role)] = [(100 * i / (len(means) - 1), value) for i, value in enumerate(means)]
    chart = lines(series, "singular value, % of their number", "share of the largest", log=True)
    sections.append(_section("Spectra of the original, mean over depths", chart))
    depth = {
        _plain(role): sorted(
            (float(at[1]), c.rank_a) for c in members if (at := DEPTH.search(c.name)) and c.rank_a is not None
        )
        for role, members in most
    }
    sections.append(_section("Effective rank by depth", lines(depth, "layer", "effective rank")))
    return sections


def _quality(
    packed: Path, original: str | Path, text: Path, context: int, tokens: int, progress: Progress
) -> list[str]:
    """Return what a model loses on a text, and of language models what both write after its first words."""
    task = task_of(original)
    models, processor = [load_for_task(path, task) for path in (original, packed)], load_processor(original, task)
    evaluation = compare_loaded(
        models, processor, original, text, task, context=context, tokens=tokens, progress=progress
    )
    sections = [_section("Quality", _measures(evaluation))]
    if task == LANGUAGE:
        report: Any = evaluation[1][0]
        steps = report.kl_by_position
        points = [((i + 0.5) * (report.context - 1) / len(steps), value) for i, value in enumerate(steps)]
        chart = lines({"KL divergence": points}, "position in the window", "nats")
        sections.append(_section("KL divergence by position", chart))
        sections.append(_section("Side by side, greedily", _side_by_side(models, processor, text, progress)))
    return sections


def _measures(found: tuple[str, Sequence[Any]]) -> str:
    inputs, (report,) = found
    rows = [
        [key.replace("_", " "), f"{value:.5g}" if isinstance(value, float) else str(value)]
        for key, value in report.to_json().items()
        if not isinstance(value, tuple | list | dict)
    ]
    intervals = {key: value for key, value in report.to_json().items() if key.endswith("_interval") and value}
    rows += [[f"{key.replace('_', ' ')}, 95%", f"{low:.5g} to {high:.5g}"] for key, (low, high) in intervals.items()]
    return f"<p class=note>{_plain(inputs)}</p>" + _table(["measure", "value"], rows)


def _side_by_side(models: Sequence[Any], processor: Any, text: Path, progress: Progress) -> str:
    """Return what the original and the packed model write after the beginnings of some lines."""
    beginnings = [line.strip() for line in text.read_text("utf-8", "replace").splitlines() if len(line.split()) > 8]
    drawn = []
    for line in beginnings[: 3 * 7 : 7]:
        prompt = " ".join(line.split()[:8])
        given = processor(prompt, return_tensors="pt")
        answers = []
        for model in models:
            progress("Writing", WRITTEN, 6 * WRITTEN, "tokens", prompt)
            ids = model.generate(input_ids=given["input_ids"], do_sample=False, max_new_tokens=WRITTEN, pad_token_id=0)
            answers.append(processor.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
        pair = zip(("original", "packed"), answers, strict=True)
        drawn.append(
            "".join(
                f"<blockquote><b>{label}: {_plain(prompt)}</b> {_plain(answer)}</blockquote>" for label, answer in pair
            )
        )
    return "".join(f'<div class="pair">{pair}</div><br>' for pair in drawn) or _note(
        "The text has no line of more than eight words."
    )


def _tensors(stored: Sequence[StoredTensor]) -> str:
    rows = [[t.name, "×".join(map(str, t.shape)), t.codec or "raw", t.bits_per_weight, t.nbytes] for t in stored]
    return _section("All tensors", _table(["tensor", "shape", "codec", "bits", "bytes"], rows))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table that sorts by the column that is clicked."""

    def cell(value: Any) -> str:
        if isinstance(value, float | int):
            shown = "" if value != value else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
            return f'<td data-v="{-1e300 if value != value else value}">{shown}</td>'
        return f"<td>{_plain(value)}</td>"

    head = "".join(f"<th><button>{_plain(name)}</button></th>" for name in columns)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_plain(title)}</h2>{content}</section>" if content else ""


def _note(text: str) -> str:
    return f"<p class=note>{_plain(text)}</p>"


def _role(name: str) -> str:
    found = DEPTH.search(name)
    return (name[found.end() :] if found else name).removesuffix(".weight")


def _plain(text: object) -> str:
    """Return text as it may stand in a page: names come from files."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(text)))
