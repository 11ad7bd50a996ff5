"""Targets: plans, entries of a journal, configs of Hugging Face."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.journal import Journal
from seedpack.converter.plan import Plan, default_plan
from seedpack.converter.report import TensorReport
from seedpack.converter.sources.base import SourceTensor
from seedpack.errors import SeedpackError
from seedpack.formats.header import loads_strict
from seedpack.formats.reader import manifest_from_config
from seedpack.hf.config import SeedpackConfig
from seedpack.hf.quantization import block_sizes, dense_dtype, quantizations, require_read, without_quantization
from tests.fuzz.draws import Draws, edited
from tests.fuzz.sound import room, sealed, sound
from tests.helpers.checkpoints import join, split

TENSORS = {
    "a.weight": SourceTensor("F32", (24, 40), "linear"),
    "b.weight": SourceTensor("BF16", (3, 16, 24), "expert", stacked=True),
    "c.weight": SourceTensor("F32", (5,)),
    "d.weight": SourceTensor("F16", (130, 16), "embedding", transposed=True),
}
CODEC = TrellisCodec(3, effort="fast")


@cache
def _plan() -> Plan:
    return default_plan(TENSORS, {}, CODEC)


def plan(data: bytes) -> None:
    """Follow a plan document with changes, or any text in its place."""
    draws = Draws(data)
    document = (
        edited(_plan().to_json(), draws) if draws.below(4) < 3 else loads_strict(draws.rest().decode("latin-1"), "x")
    )
    made = _plan().edited(document)
    made.check_experts()
    made.has_most_bits()
    made.totals()
    made.dumps()


ENTRY = "place-entry.safetensors"


@cache
def _entry() -> tuple[Journal, Plan, bytes]:
    """Return a journal of one entry, the plan that it is of, and its bytes."""
    chosen = default_plan({"a.weight": TENSORS["a.weight"]}, {}, CODEC)
    kept = Journal(room() / "journal", "cpu", "")
    parts = CODEC.encode(torch.linspace(-1, 1, 24 * 40).view(24, 40))
    kept.put("place", "entry", parts, TensorReport(chosen.tensors[0], 1.0, 2.0, 3.0))
    return Journal(kept.folder, "cpu", ""), chosen, (kept.folder / ENTRY).read_bytes()


def journal(data: bytes) -> None:
    """Read a journal's entry of any bytes, or a sound one with changes; what is accepted can be decoded."""
    draws, (kept, chosen, entry) = Draws(data), _entry()
    if draws.below(4) < 3:
        document, body = split(entry)
        flips = draws.below(3) * bytes([1 << draws.below(8)])
        body = bytes(a ^ b for a, b in zip(body, flips.ljust(len(body), b"\0"), strict=True))
        written = join(json.dumps(edited(document, draws, 2)), body)
    else:
        written = draws.rest()
    (kept.folder / ENTRY).write_bytes(written)
    if (read := kept.of_bytes("entry", chosen.tensors[0])) is not None:
        chosen.tensors[0].codec.decode(read[0], (24, 40), torch.float32)


def config(data: bytes) -> None:
    """Read a config with changes, as the reader and transformers do, and what it says of other quantisations."""
    draws = Draws(data)
    packed = {"quant_method": "seedpack", **draws.pick(sound()).manifest}
    blocks = {"weight_block_size": [4, 4], "config_groups": {"g": {"weights": {"block_structure": [2, 2]}}}}
    document = {"dtype": "float16", "text_config": {"quantization_config": {"quant_method": "fp8", **blocks}}}
    document = edited({**document, "quantization_config": packed}, draws)
    found: Any = document.get("quantization_config")
    if isinstance(found, dict):
        body = {key: value for key, value in found.items() if key != "quant_method"}
        document["quantization_config"] = found = {**found, "digest": sealed(body).get("digest")}
    without_quantization(document)
    dense_dtype(document)
    said = quantizations(document)
    for read in (
        lambda: manifest_from_config(document, "x"),
        lambda: SeedpackConfig.from_dict(found) if isinstance(found, dict) else None,
        lambda: require_read(said, Path("x")),
    ):
        with suppress(SeedpackError):
            read()
    with suppress(SeedpackError):
        require_read(said, Path("x"))
        block_sizes(said)
