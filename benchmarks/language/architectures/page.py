"""The page of a sweep: how many architectures agree, which are left out, what stays raw, and the sizes."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.language.architectures.case import MANY_WEIGHTS
from benchmarks.language.architectures.checks import TOLERANCE
from benchmarks.language.architectures.models import LARGEST
from benchmarks.lib import report

TITLE = "Every architecture of transformers, packed"
STATUSES = ("ok", "weights", "skip", "fail")
MUCH = 0.2  # the share of weights that is a reason to be listed
VECTORS = "no matrix"
Records = Mapping[str, dict[str, Any]]
# groups of errors: the group's heading, and a pattern whose first group, if any, is what tells
REASONS = (
    ("a package is not installed", r"requires the (\S+) library"),
    (f"more than {LARGEST:,} weights by these rules", r"too large: ([\d,]+ weights)"),
    ("transformers does not export it", r"module transformers has no (attribute)"),
    ("transformers saves it and cannot load it", r"cannot save and load it: (.*)"),
    ("its config refuses the small sizes", r"Validation\w*Error: .*?Error: (.*)"),
    ("the time was not enough", r"TimedOut: (.*)"),
    ("transformers cannot build it so small", r"(.*)"),
)


def write(result: report.Result, records: Records, count: int) -> None:
    """Say and tabulate what the records of some cases hold, of a count of cases."""
    done = "" if len(records) >= count else f" So far {len(records)} of {count} were run."
    result.say(
        "Each architecture of transformers that a tiny model can be made of, with random weights: every class for "
        f"a task of language, and one class of each other model type.{done}"
    )
    result.say(
        "The model is saved by transformers, packed by `seedpack.compress` at 4 bits (where it has more than "
        f"{MANY_WEIGHTS:,} weights by seedlm at 3), and loaded by its auto class. It must agree with what "
        "`seedpack.unpack` makes of it: outputs of every kind of input that works (relative difference at most "
        f"{TOLERANCE:g}), outputs of towers for images and sounds, five generated tokens. Saved and loaded again it must "
        "give the same outputs in no more bytes, and `dequantize()` the same tensors."
    )
    result.say(
        "- ok: all agree.\n- weights: no input was found that the model takes; its tensors agree.\n"
        "- skip: transformers itself cannot build, save or load it here.\n- fail: something raised or differs."
    )
    counts(result, records)
    failures(result, records)
    skipped(result, records)
    raw(result, records)
    sizes(result, records)


def counts(result: report.Result, records: Records) -> None:
    tasks: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records.values():
        tasks[record["task"].lower().replace("_", " ")][record["status"]] += 1
    total = Counter(record["status"] for record in records.values())
    rows = [(task, *(found[status] for status in STATUSES), found.total()) for task, found in tasks.items()]
    result.say("## Counts")
    result.table(["task", *STATUSES, "all"], [*rows, ("all", *(total[s] for s in STATUSES), total.total())])


def failures(result: report.Result, records: Records) -> None:
    rows = [
        (f"`{key}`", problem["kind"], cell(problem["text"]))
        for key, record in records.items()
        for problem in record["problems"][:1]
    ]
    if rows:
        result.say("## What fails\n\nThe first problem of each.")
        result.table(["class", "where", "problem"], rows)


def skipped(result: report.Result, records: Records) -> None:
    groups: dict[str, list[str]] = defaultdict(list)
    for key, record in records.items():
        if record["status"] == "skip":
            heading, detail = reason(record["why"][0])
            groups[heading].append(f"`{key}`" + (f": {detail}" if detail else ""))
    if not groups:
        return
    result.say("## What is skipped\n\nBy the reason that transformers gives for the first config that was tried.")
    for heading in (heading for heading, _ in REASONS if heading in groups):
        items = "\n".join(f"- {item}" for item in groups[heading])
        result.say(f"**{heading[0].upper()}{heading[1:]}** ({len(groups[heading])})\n\n{items}")


def reason(why: str) -> tuple[str, str]:
    """Return the group of an error of transformers, and what it says.

    >>> reason("ImportError: DinatModel requires the natten library but it was not found")
    ('a package is not installed', 'natten')
    """
    why = re.sub(r"/\S*/architectures-\w+/", "", why)
    for heading, pattern in REASONS:
        if found := re.search(pattern, why):
            return heading, cell(found[1]) if found[1] != "attribute" else ""
    raise AssertionError("the last pattern matches anything")


def raw(result: report.Result, records: Records) -> None:
    rows = []
    for key, record in records.items():
        shares = grouped(record.get("raw_shares", {}))
        total = sum(shares.values())
        if total > MUCH:
            note, share = max(shares.items(), key=lambda item: item[1])
            rows.append((total, (f"`{key}`", f"{total:.0%}", note, f"{share:.0%}")))
    result.say(
        f"## What stays raw\n\nThe models that have more than {MUCH:.0%} of their weights in raw tensors, vectors not "
        "counted, and the main reason with its share."
    )
    if rows:
        result.table(["class", "raw", "main reason", "by it"], [row for _, row in sorted(rows, key=lambda r: -r[0])])
    else:
        result.say("None.")


def grouped(shares: Mapping[str, float]) -> dict[str, float]:
    """Return shares of weights by reasons that name no tensor and no number of bits; vectors left out.

    >>> grouped({"trellis would take 40.0 bits per weight": 0.25, "trellis would take 50.0 bits per weight": 0.25})
    {'would take more bits than it does': 0.5}
    """
    sums: dict[str, float] = defaultdict(float)
    for note, share in shares.items():
        if note != VECTORS:
            short = re.sub(r".* would take .*", "would take more bits than it does", note)
            sums[re.sub(r"'.*' is a tensor", "the name of a part is a tensor", short)] += share
    return dict(sums)


def sizes(result: report.Result, records: Records) -> None:
    measures = {
        "packed tensors": "bits_per_packed_weight",
        "the whole model": "bits_per_weight",
        "the file, headers included": "bits_per_weight_of_file",
    }
    rows = []
    for label, key in measures.items():
        if values := [record[key] for record in records.values() if key in record]:
            rows.append((label, *(f"{value:.2f}" for value in quantiles(values))))
    if rows:
        result.say(
            "## Bits per weight\n\nAll that is stored, scales and padding counted. Models so small pay more for them "
            "than real ones do: rows are short, and a header names every tensor. The quantiles are over the models."
        )
        result.table(["of", "least", "10%", "median", "90%", "most"], rows)


def quantiles(values: Sequence[float]) -> tuple[float, ...]:
    """Return the least value, the tenth, the half, nine tenths, and the most."""
    if len(values) < 2:
        return tuple(values) * 5
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return min(values), tenths[0], statistics.median(values), tenths[8], max(values)


def cell(text: str, length: int = 120) -> str:
    """Return a text for a cell of a table."""
    text = " ".join(text.split()).replace("|", "/").replace("<", "&lt;").replace("`", "'")
    return text if len(text) <= length else f"{text[:length]} …"
