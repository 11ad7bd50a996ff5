"""Helpers to look into plans."""

from __future__ import annotations

from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.plan import Plan


def bits_of(plan: Plan) -> dict[str, float]:
    """Return the code bits of tensors that `trellis` packs, by name."""
    return {t.name: t.codec.code_bits for t in plan.tensors if isinstance(t.codec, TrellisCodec)}
