"""The command `seedpack compare`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from seedpack.cli import output


@click.command("compare")
@click.argument("a")
@click.argument("b")
@click.option("--ranks/--no-ranks", default=True, help="Compute effective ranks (one eigendecomposition per tensor).")
@click.option(
    "--state-key", help="Of .pt files: the key, or keys with dots between them, that the state dict is under."
)
@output.key_option
@output.max_bytes_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(a: str, b: str, ranks: bool, state_key: str | None, max_bytes: int | None, as_json: bool) -> None:
    """Compare the tensors of model B with those of model A, the reference; each may be dense or packed.

    Relative error is ‖A-B‖²/‖A‖². The effective rank is the exponential of the entropy of the normalised singular
    values. For tensors packed by svd, the energy captured is shown beside that of the best approximation of its rank.
    """
    from seedpack.converter.report import decibels
    from seedpack.eval.tensors import compare_tensors

    output.quiet_transformers()
    lone, count, comparisons = compare_tensors(a, b, ranks=ranks, max_bytes=max_bytes, state_key=state_key)
    compared = []
    with output.progress("Comparing", count, "tensors") as advance:
        for comparison in comparisons:
            compared.append(comparison)
            advance(comparison.name, 1)
    changed = [c for c in compared if c.error != 0]
    overall = decibels(sum(c.error for c in changed), sum(c.energy for c in changed))
    if as_json:
        tensors = [{**asdict(c), "error_db": decibels(c.error, c.energy)} for c in compared]
        output.show_json({"error_db": overall, "only_in_one": lone, "tensors": tensors})
        return
    columns = ["tensor", "error", "rank A", "rank B", "rank", "captured", "optimal"]
    rows = [
        [
            c.name,
            output.db(decibels(c.error, c.energy)),
            _number(c.rank_a),
            _number(c.rank_b),
            "" if c.rank is None else str(c.rank),
            _share(c.captured),
            _share(c.optimal),
        ]
        for c in changed
    ]
    used = [i for i in range(len(columns)) if i < 2 or any(row[i] for row in rows)]
    total = [f"all {len(changed)} that differ; {len(compared) - len(changed)} equal", output.db(overall), *[""] * 5]
    output.show_table(
        f"{b} against {a}: relative error, effective ranks",
        [columns[i] for i in used],
        [[row[i] for i in used] for row in rows],
        [total[i] for i in used],
    )
    if lone:
        output.echo(f"in one of the two models only: {output.count(len(lone), 'tensor')}, such as {lone[0]!r}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _share(value: Any) -> str:
    return "" if value is None else f"{100 * value:.2f}%"
