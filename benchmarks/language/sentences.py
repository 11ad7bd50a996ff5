"""A sentence encoder packed: how far its embeddings move, beside what a user would pick instead."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import seedpack
from benchmarks.language import choices, table
from benchmarks.lib import models, peers, plots, report
from benchmarks.lib.trellises import trellises

OURS = (("trellis", 4.0), ("trellis", 3.0), ("trellis", 2.0), ("seedlm", 4.0), ("seedlm", 3.0))


def measure(result: report.Result) -> None:
    folder = models.minilm()
    model, embed = choices.embeddings(folder)
    original = embed(model)

    def ours(codec: str, bits: float) -> dict[str, Any]:
        done, other = pack(folder, codec, bits)
        return scored(other, codec, done.plan.totals()["bits_per_packed_weight"], done.error_db)

    def theirs(family: str, quantise: peers.Quantiser) -> dict[str, Any]:
        other = copy.deepcopy(model)
        return scored(other, family, *peers.replace_weights(other, quantise))

    def scored(other: Any, family: str, bits: float, error_db: float) -> dict[str, Any]:
        cosine = 1 - float((embed(other) * original).sum(1).mean())
        return {"family": family, "bits": bits, "error_db": error_db, "cosine": cosine}

    ways = {f"{codec}, {bits:g} bits": partial(ours, codec, bits) for codec, bits in OURS}
    ways |= {label: partial(theirs, *peer) for label, peer in (peers.data_free() | trellises()).items()}
    rows = sorted(result.rows_of(ways, lambda way: way()).values(), key=lambda r: r["bits"])
    result.say(
        "all-MiniLM-L6-v2 (22.7 million true float32 weights), all linear layers and embeddings packed; 256 lines of "
        f"{models.text()[0]}, up to 128 tokens each; mean 1 − cosine of each embedding to the original model's. No data "
        "used by any method, so AutoRound and an importance matrix have no rows. Peers as in [language](language.md); EXL3's quantiser is written again (`benchmarks/lib/exl3.py`), and takes "
        "embeddings here too."
    )
    result.table(
        ["method", "bits per weight", "relative error", "1 − cosine", "measured"],
        [
            (r["label"], f"{r['bits']:.3f}", f"{r['error_db']:.2f} dB", f"{r['cosine']:.5f}", r["measured"])
            for r in rows
        ],
    )
    table.compare(result, rows, "cosine", "1 − cosine")
    plots.curves(
        result, rows, "cosine", "1 − cosine to the original's embedding", "all-MiniLM-L6-v2: error against bits", (2, 6)
    )


def pack(folder: Path, codec: str, bits: float) -> tuple[Any, Any]:
    """Packed by seedpack, loaded as a user would."""
    out = models.CACHE / f"sentences-{codec}-{bits:g}"
    shutil.rmtree(out, ignore_errors=True)
    return seedpack.compress(folder, out, codec=codec, bits=bits), seedpack.load(out).eval()


if __name__ == "__main__":
    report.run("sentences", "A sentence encoder, packed", measure)
